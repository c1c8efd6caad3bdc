"""How a call has ended, as worker, node and master tell each other.

VALUE: it has given a value. RAISED: it has raised. STOPPED: nobody wanted it any more. BROKEN: the setup of its
submitter has raised. LOST: its worker has ended. AGAIN: nobody has begun it, or what began it is gone. IN_FILE: like
VALUE, but it lies in a file; only a worker says that to its node.
"""

VALUE, RAISED, STOPPED, BROKEN, LOST, AGAIN, IN_FILE = range(7)
