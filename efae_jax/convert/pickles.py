"""Pickles, read by a machine that cannot run code.

Python's unpickler imports what a pickle names and calls it. Here the instructions are decoded
by `pickletools` and followed symbolically: a name stays a name, a call stays a `Call`, an
object's state is only kept. There is no operation that imports, calls or sets an attribute,
so a class that nobody knows (a training framework's callback) is an inert stand-in. Names that
exist to run code are refused all the same: a file that holds them is not weights.
"""

from __future__ import annotations

import dataclasses
import pickletools
from typing import IO, Any

from efae_jax.errors import UserError


class DamagedError(ValueError):
    """Content that makes no sense; the message says in what, for the caller to name the file."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Modules of Python that run programs, load code or reach into the interpreter.
_RUNS_CODE = _words(
    "builtins __builtin__ os posix nt subprocess sys shutil pty runpy importlib imp pkgutil ctypes "
    "_ctypes code codeop commands pickle _pickle cPickle dill cloudpickle marshal shelve io _io "
    "operator _operator multiprocessing socket webbrowser urllib urllib2 http httplib requests pip "
    "timeit profile cProfile pdb bdb trace"
)
# What of the builtins is only a kind of value.
_HARMLESS_BUILTINS = _words(
    "bool bytearray bytes complex dict float frozenset int list object set slice str tuple type "
    "unicode long range xrange"
)
# Wherever they stand in a dotted name ("torch.serialization.os.system").
_RUNS_CODE_ANYWHERE = _words(
    "os posix nt subprocess sys builtins __builtin__ eval exec execfile compile system popen "
    "__import__ import_module getattr runstring __subclasses__ __globals__ __builtins__ "
    "__class__ __base__ __mro__ __init__ __reduce__ __reduce_ex__ __code__"
)
_DICTS = frozenset(
    {
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("builtins", "dict"),
        ("__builtin__", "dict"),
    }
)
# A dictionary's keys are hashed by their content, whose depth a file must not choose.
_KEYS = (str, bytes, int, float, bool, type(None))
_MARK = object()


@dataclasses.dataclass(frozen=True, eq=False)
class Name:
    """A global that a pickle names; never looked up."""

    module: str
    name: str


@dataclasses.dataclass(eq=False)
class Call:
    """function(*args), with the state that was given to the result; never carried out."""

    function: Any
    args: Any
    state: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Persistent:
    """An object that lies outside the pickle, such as a tensor's memory."""

    id: Any


def read(file: IO[bytes]) -> Any:
    """The value of the pickle that starts here; `file` stands behind it afterwards.

    Numbers, strings, lists, tuples and dictionaries (ordered ones too) are themselves;
    all else is `Name`, `Call` or `Persistent`.

    Raises:
      UserError: it names something that runs code.
      Exception: whatever damaged bytes lead to; the caller knows the file's name.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(file):
        machine.step(opcode.name, argument)
    if (value := machine.stack.pop()) is _MARK:
        raise DamagedError("the pickle has no value")
    return value


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self.stack.append(_LITERALS[opcode])
        elif opcode in _VALUES:
            self.stack.append(argument)
        elif opcode in _COLLECT:
            items = self._pop_mark()
            self.stack.append(_COLLECT[opcode](items))
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            method = getattr(self, f"_{opcode.lower()}", None)
            if method is None:
                raise UserError(f"the pickle's instruction {opcode} is not supported")
            method(argument) if opcode in _WITH_ARGUMENT else method()

    def _pop_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _mark(self) -> None:
        self.stack.append(_MARK)

    def _pop(self) -> None:
        self.stack.pop()

    def _dup(self) -> None:
        self.stack.append(self.stack[-1])

    def _empty_list(self) -> None:
        self.stack.append([])

    def _empty_dict(self) -> None:
        self.stack.append({})

    def _empty_tuple(self) -> None:
        self.stack.append(())

    def _empty_set(self) -> None:
        self.stack.append(Call(Name("builtins", "set"), ()))

    def _tuple1(self) -> None:
        self._tuple(1)

    def _tuple2(self) -> None:
        self._tuple(2)

    def _tuple3(self) -> None:
        self._tuple(3)

    def _tuple(self, size: int) -> None:
        items = tuple(self.stack[-size:])
        del self.stack[-size:]
        self.stack.append(items)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _additems(self) -> None:
        self._pop_mark()

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _update(self.stack[-1], [key, value])

    def _setitems(self) -> None:
        items = self._pop_mark()
        _update(self.stack[-1], items)

    def _global(self, argument: str) -> None:
        self.stack.append(_name(*argument.split(" ", 1)))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_name(module, name))

    def _inst(self, argument: str) -> None:
        args = tuple(self._pop_mark())
        self.stack.append(_call(_name(*argument.split(" ", 1)), args))

    def _obj(self) -> None:
        function, *args = self._pop_mark()
        self.stack.append(_call(function, tuple(args)))

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_call(function, args))

    _newobj = _reduce

    def _newobj_ex(self) -> None:
        self.stack.pop()
        self._reduce()

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Call):
            self.stack[-1].state = state

    def _persid(self, argument: str) -> None:
        self.stack.append(Persistent(argument))

    def _binpersid(self) -> None:
        self.stack.append(Persistent(self.stack.pop()))


def _dict(items: list[Any]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    _update(made, items)
    return made


_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = _words(
    "FLOAT BINFLOAT INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8"
)
_COLLECT = {
    "TUPLE": tuple,
    "LIST": list,
    "DICT": _dict,
    "FROZENSET": lambda items: Call(Name("builtins", "frozenset"), ()),
}
_WITH_ARGUMENT = ("GLOBAL", "INST", "PERSID")


def _update(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if isinstance(key, _KEYS) else Call(key, ())] = value


def _call(function: Any, args: Any) -> Any:
    if isinstance(function, Name) and (function.module, function.name) in _DICTS:
        # OrderedDict([[key, value], ...]), as the oldest protocols write it.
        pairs = args[0] if args and isinstance(args[0], list) else []
        return _dict([item for key, value in pairs for item in (key, value)])
    return Call(function, args)


def _name(module: Any, name: Any) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise DamagedError("a global's name is no string")
    first, *others = f"{module}.{name}".split(".")
    harmless = module in ("builtins", "__builtin__") and name in _HARMLESS_BUILTINS
    if not harmless and (first in _RUNS_CODE or not _RUNS_CODE_ANYWHERE.isdisjoint(others)):
        shown = f"{module}.{name}"
        raise UserError(
            f"the pickle names {shown if shown.isprintable() else repr(shown)}, which can run "
            "code: refused"
        )
    return Name(module, name)
