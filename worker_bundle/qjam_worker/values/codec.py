"""Python and numpy values to a header and bare buffers, and exactly back.

What comes back has the same type and value, to the last bit: a tuple stays a tuple, np.float32 stays
np.float32, an array keeps dtype, byte order, shape and memory order. Two things are not kept: that one list
or array stood in two places of a value (two equal ones arrive, so that equal values have equal bytes), and
np.memmap, which arrives as an array. Sets are written in an order that does not depend on the process.

The encoder first lowers the value to what msgpack carries unchanged: None, bool, 64-bit int, float, str, short bytes,
list, and dict with such keys. Everything else becomes an ext type, or, where it holds other values, a list
that begins with a mark. Marks are ext types too, and a user's own ExtType is pickled: no value can pass for
a mark. What has no ext type is pickled, all such objects of a value together.
"""

from .decoder import decode
from .encoder import encode
from .header import Buffer, CodecError, Encoded, bytes_view
from .lone_arrays import is_lone

__all__ = ["Buffer", "CodecError", "Encoded", "bytes_view", "decode", "encode", "is_lone"]
