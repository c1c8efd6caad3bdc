"""Classes of a script: their instances travel, come back as what they were, and the class is left alone everywhere."""

from __future__ import annotations

import textwrap

from own_programs import hosts, script  # noqa: F401
from ssh_hosts import home, ssh_host  # noqa: F401


def test_the_class_here_is_left_alone(script):
    source = """
        from qjam import Master

        class Model:
            SCALE = 1
            shared = []
            def scaled(self):
                return self.SCALE * 10
            def other(self):
                return 1

        def work(params, part):
            Model.SCALE = 77
            Model.made_there = True
            return {"model": Model()}

        def back(params, part):
            return {"model": params}

        method, shared = Model.scaled, Model.shared
        with Master(HOSTS) as master:
            for function in (work, back):
                model = master.run(function, Model(), [0])["model"]
                print(type(model) is Model, Model.SCALE, hasattr(Model, "made_there"))
                print(Model.scaled is method, Model.shared is shared)
                Model.SCALE = 5
                print(model.scaled())
                Model.SCALE = 1
                Model.other = lambda self: 2
                print(model.other())
        """
    assert script(source) == ["True 1 False", "True True", "50", "2"] * 2


KINDS = """
    import abc, collections, dataclasses, enum, typing
    from qjam import Master, TaskError

    @dataclasses.dataclass(order=True)
    class Point:
        x: int = 0
        tags: list = dataclasses.field(default_factory=list)

    @dataclasses.dataclass(frozen=True)
    class Frozen:
        x: int

    class Slotted:
        __slots__ = ("x", "__hidden")
        def __init__(self, x): self.x = x

    class Pair(typing.NamedTuple):
        a: int
        b: str = "b"

    Plain = collections.namedtuple("Plain", "a b")

    class Colour(enum.Enum):
        RED = 1
        GREEN = "g"
        def shout(self): return self.name + "!"

    class Flag(enum.IntFlag):
        A = 1
        B = 2

    class Meta(type):
        def __call__(cls, *args): return super().__call__(*args)

    class WithMeta(metaclass=Meta):
        pass

    class Base(abc.ABC):
        @abc.abstractmethod
        def area(self): ...

    class Square(Base):
        def __init__(self, a): self.a = a
        def area(self): return self.a ** 2

    T = typing.TypeVar("T")
    class Box(typing.Generic[T]):
        pass

    class Outer:
        class Inner:
            pass

    class Words(list):
        pass

    class Options(dict):
        pass

    class Trouble(ValueError):
        def __init__(self, code, text):
            super().__init__(code, text)
            self.code = code

    def make():
        class Local:
            def __eq__(self, other): return type(self) is type(other)
        return Local
    Local = make()

    def values():
        return [Point(1, [2]), Frozen(2), Slotted(3), Pair(1), Plain(1, 2), Colour.RED, Colour.GREEN, Flag.A | Flag.B,
                WithMeta(), Square(3), Box(), Outer.Inner(), Words([1]), Options(a=1), Trouble(3, "x"), Local(), Point]
    """


def test_every_kind_of_class_comes_back_as_itself(script):
    source = (
        textwrap.dedent(KINDS)
        + """
def made_there(params, part):
    return values()

def sent_there(params, part):
    assert list(map(type, params)) == list(map(type, part)) == list(map(type, values()))
    assert params[5] is Colour.RED and params[5].shout() == "RED!" and params[9].area() == 9
    assert isinstance(params[9], Base)
    return params

with Master(HOSTS) as master:
    for function in (made_there, sent_there):
        for _ in range(2):
            result = master.run(function, values(), [values()] if function is made_there else values())
            print([type(a).__name__ for a, b in zip(result, values()) if type(a) is not type(b)])
            print(result[0] == Point(1, [2]), result[5] is Colour.RED, result[5].shout(), result[7] is Flag.A | Flag.B)
            print(result[9].area(), result[14].code, result[15] == Local(), result[16] is Point)
"""
    )
    source = source.replace("[values()] if function is made_there else values()", "DataSet(values(), slice_size=100)")
    source = source.replace("import Master, ", "import DataSet, Master, ")
    assert script(source) == ["[]", "True True RED! True", "9 3 True True"] * 4


def test_exceptions_of_a_script_are_the_cause(script):
    source = """
        from qjam import Master, TaskError
        import numpy as np

        class Trouble(Exception):
            LEVEL = 1
            def __init__(self, code, why):
                super().__init__(code, why)
                self.code = code

        class Worse(Trouble):
            pass

        def outer():
            class Hidden(Exception):
                pass
            return Hidden
        Hidden = outer()

        def fail(params, part):
            Trouble.LEVEL = 9
            if params == 0: raise Worse(3, np.arange(3))
            if params == 1: raise Hidden("h")
            raise params

        with Master(HOSTS) as master:
            for what in (0, 1, Worse(5, "sent")):
                try:
                    master.run(fail, what, [0])
                except TaskError as error:
                    print(type(error.__cause__) in {Worse, Hidden}, getattr(error.__cause__, "code", 0), Trouble.LEVEL)
        """
    assert script(source) == ["True 3 1", "True 0 1", "True 5 1"]


def test_what_user_code_keeps_on_a_class_lasts_until_the_class_is_changed_here(script):
    source = """
        from qjam import Master

        class Model:
            calls = 0
            cache = {}
            RATE = 1
            def step(self): return 1

        class Sub(Model):
            pass

        RATE = 1
        def rate(): return RATE

        class Uses:
            calls = 0
            def get(self): return rate() * RATE

        def sent_only(params, part):
            kind = type(params)
            kind.calls += 1
            kind.cache[len(kind.cache)] = None
            return {"all": (kind.calls, len(kind.cache), params.RATE, params.step())}

        def named(params, part):
            Model.calls += 1
            Model.cache[len(Model.cache)] = None
            return {"all": (Model.calls, len(Model.cache), params.RATE, params.step())}

        def uses(params, part):
            type(params).calls += 1
            return {"all": (type(params).calls, params.get())}

        with Master(HOSTS.replace("2", "1")) as master:
            def show(function, params):
                print(*master.run(function, params, [0])["all"], end="; ")
            for function in (sent_only, named):
                show(function, Model())
                show(function, Model())
                Model.RATE += 10
                show(function, Model())
                show(function, Model())
                Model.step = lambda self: 2
                show(function, Model())
                Model.cache["changed", "inside"] = 1
                show(function, Model())
                del Model.cache["changed", "inside"]
                Model.RATE = 1
                Model.step = lambda self: 1
                print()
            show(uses, Uses())
            show(uses, Uses())
            RATE = 3
            show(uses, Uses())
            RATE = 4
            show(uses, Uses())
            print()
        """
    lines = script(source)
    changed = "1 1 1 1; 2 2 1 1; 1 1 11 1; 2 2 11 1; 3 3 11 2; 1 2 11 2; "
    assert lines == [changed, changed, "1 1; 2 1; 3 9; 4 16; "]


def test_a_class_defined_anew_is_another_class(script):
    source = """
        from qjam import Master
        import sys
        cells = [
            "from qjam import Master; master = Master(HOSTS)",
            "class Foo:\\n    def f(self): return 1",
            "def work(params, part): return {'old': params['old'], 'new': Foo()}",
            "old = Foo()",
            "class Foo:\\n    def f(self): return 2",
            "result = master.run(work, {'old': old}, [0])",
            "print(type(result['old']) is type(old), type(result['new']) is Foo, result['old'].f(), result['new'].f())",
            "future = master.submit(work, {'old': old}, [0])",
            "class Foo: pass",
            "import gc; gc.collect(); result = future.result()",
            "print(type(result['old']) is type(old), result['old'].f(), result['new'].f())",
            "master.close()",
        ]
        for number, cell in enumerate(cells):
            exec(compile(cell, f"<cell {number}>", "exec"), vars(sys.modules["__main__"]))
        """
    assert script(source) == ["True True 1 2", "True 1 2"]


def test_a_class_that_a_worker_makes_comes_and_may_be_sent_again(script):
    source = """
        from qjam import Master, DataSet

        class Base:
            def f(self): return 1

        def work(params, part):
            class Made(Base):
                def g(self): return 10 + self.f()
            return {"a": Made(), "b": Made(), "c": type("Dynamic", (Base,), {"h": 5})()}

        def again(params, part):
            return params.g()

        with Master(HOSTS) as master:
            result = master.run(work, None, [0])
            print(type(result["a"]) is type(result["b"]), isinstance(result["a"], Base), result["a"].g(), result["c"].h)
            print(master.run(again, result["a"], DataSet([1, 2, 3, 4], slice_size=1)))
            print(type(master.run(lambda p, s: {"p": p}, result["a"], [0])["p"]) is type(result["a"]))
        """
    assert script(source) == ["True True 11 5", "44", "True"]


def test_results_of_a_class_are_reduced_in_workers_that_have_never_met_it(script, tmp_path):
    (tmp_path / "adding.py").write_text(
        "def mapfunc(params, part): return part[0] if params is None else params\ndef reduce(a, b): return a.plus(b)\n"
    )
    source = """
        import adding
        from qjam import DataSet, Master

        class Number:
            def __init__(self, x): self.x = x
            def plus(self, other): return Number(self.x + other.x)

        with Master(HOSTS) as master:
            for _ in range(3):
                total = master.run(adding, None, DataSet([Number(i) for i in range(64)], slice_size=1))
                print(type(total) is Number, total.x)
                total = master.run(adding, Number(1), DataSet(list(range(64)), slice_size=1))
                print(type(total) is Number, total.x)
        """
    assert script(source) == ["True 2016", "True 64"] * 3


def test_globals_are_shared_by_a_function_and_the_methods_that_it_is_given(script):
    source = """
        from qjam import DataSet, Master

        SEEN = []

        class Model:
            def see(self, x): SEEN.append(x)

        def work(params, part):
            params.see(1)
            Model().see(2)
            part[0].see(3)
            return {"seen": len(SEEN)}

        with Master(HOSTS.replace("2", "1")) as master:
            data = DataSet([Model()], slice_size=1)
            print(master.run(work, Model(), data)["seen"], master.run(work, Model(), data)["seen"])
        """
    assert script(source) == ["3 6"]


def test_a_class_that_has_changed_is_no_change_of_the_data(script):
    source = """
        from qjam import DataSet, Master

        class Sample:
            made = 0
            def __init__(self, x):
                self.x = x
                Sample.made += 1
            def value(self): return self.x

        def work(params, part): return sum(sample.value() for sample in part)

        data = DataSet([Sample(i) for i in range(8)], slice_size=2)
        for _ in range(2):
            with Master(HOSTS) as master:
                print(master.run(work, None, data))
                Sample(1)
                print(master.run(work, None, data), Sample.made)
                Sample.value = lambda self: self.x * 10
                print(master.run(work, None, data), master.run(work, (1,), data))
        """
    assert script(source) == ["28", "28 9", "280 280", "280", "280 10", "280 280"]
