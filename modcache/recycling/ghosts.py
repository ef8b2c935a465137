"""Stand-ins for values that are not computed: shape, dtype and device, bound to a stored value at the cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CutError
from .asks import DEMANDS, FACTS, LIKE, MOVES, around_now, chance_now, chance_of, name_of, under
from .origins import Derived, Origin, Sheet, Spec, spec_of
from .trees import ATOMS, located, mapped

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Ghost", "Origin", "filled", "settled", "unwrapped"]


class Ghost(torch.Tensor):
    """A tensor without values. Once it is bound, it is the tensor that it is bound to, wherever it is used."""

    sheet: Sheet
    source: Origin | Derived
    value: torch.Tensor | None = None
    meta: torch.Tensor | None = None
    wants_grad: bool = False
    _bound_at: int = 0

    @staticmethod
    def __new__(cls, sheet: Sheet, spec: Spec, source: Origin | Derived, meta: torch.Tensor | None = None) -> Self:
        """A ghost of this shape."""
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, spec.shape, strides=spec.stride, dtype=spec.dtype, device=spec.device
        )
        made.sheet, made.source = sheet, source
        if meta is not None:
            made.meta = meta
        return made  # type: ignore[no-any-return]

    def bind(self, value: torch.Tensor) -> torch.Tensor:
        """Be this tensor from now on."""
        if value.is_inference() and self.sheet.derived:  # which would not show that it is written in place
            with torch.inference_mode(False):
                value = value.clone()
        self.value = value
        self._bound_at = 0 if value.is_inference() else value._version
        return value

    def is_written(self, before: int) -> bool:
        """Whether it was written in place since it had been so often, or since it is bound."""
        if self.meta is not None and self.meta._version != before:
            return True
        return self.value is not None and not self.value.is_inference() and self.value._version != self._bound_at

    def __repr__(self) -> str:  # type: ignore[override]
        """Readable, without a value."""
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype = tuple(self.shape), self.dtype
        return f"Ghost({self.source}, shape={shape}, dtype={dtype}, {'bound' if self.value is not None else 'unbound'})"

    def __format__(self, spec: str) -> str:
        """As its text."""
        return repr(self) if self.value is None else format(self.value, spec)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Work out what an operation on ghosts gives."""
        if func not in FACTS:
            return _operate(func, args, kwargs or {})
        kwargs = kwargs or {}
        ghost = args[0] if args else kwargs.get("input")
        if type(ghost) is Ghost and ghost.value is not None:
            return func(*mapped(args, unwrapped), **mapped(kwargs, unwrapped))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Reached only by what goes around functions of torch: there, a value is needed."""
        kwargs = kwargs or {}
        return func(*mapped(args, unwrapped), **mapped(kwargs, unwrapped))


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The value of a ghost, or the tensor itself.

    Raises:
        CutError: the ghost is not bound, and its value is not stored.
    """
    return _force(tensor) if type(tensor) is Ghost else tensor


def settled(ghost: Ghost) -> torch.Tensor:
    """The value of a ghost if it has one, else the ghost: nobody has asked for it yet."""
    before = ghost.sheet.error
    try:
        return _force(ghost) if ghost.sheet.reached else ghost
    except Exception:
        ghost.sheet.error = before
        return ghost


def filled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with values in the places of ghosts.

    Raises:
        CutError: the value of one is not stored.
    """
    if not ATOMS.issuperset(map(type, args)):
        args = tuple([value if type(value) in ATOMS else mapped(value, unwrapped, Ghost) for value in args])
    if not ATOMS.issuperset(map(type, kwargs.values())):
        kwargs = mapped(kwargs, unwrapped, Ghost)
    return args, kwargs


# --- operations -----------------------------------------------------------------------------------------


def _operate(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ghosts = [ghost for _, ghost in located((args, kwargs), Ghost)]
    late = any(ghost.value is not None or ghost.sheet.reached for ghost in ghosts)
    if late and name_of(func) in LIKE:
        return _like(func, args, kwargs)
    if late and all(ghost.value is not None or ghost.sheet.reached for ghost in ghosts):
        return func(*mapped(args, unwrapped), **mapped(kwargs, unwrapped))
    return _imagined(func, args, kwargs, ghosts[0].sheet)


def _like(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function that asks for shapes only; it needs no values."""
    args, kwargs = mapped(args, _stand_in, Ghost), mapped(kwargs, _stand_in, Ghost)
    return func(*args, **kwargs)


def _stand_in(ghost: Ghost) -> torch.Tensor:
    if ghost.value is not None:
        return ghost.value
    spec = _spec(ghost)
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)


def _spec(ghost: Ghost) -> Spec:
    with torch._C.DisableTorchFunctionSubclass():
        return spec_of(ghost)


def _meta_of(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is Ghost:
        if tensor.meta is None:
            spec = _spec(tensor)
            tensor.meta = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")
        return tensor.meta
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


def _imagined(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], sheet: Sheet) -> Any:
    """What an operation gives, by the rules of the meta device: ghosts again."""
    name = name_of(func)
    if name in ("requires_grad", "requires_grad_") and type(args[0]) is Ghost:
        args[0].wants_grad = bool((*args[1:], *kwargs.values(), True)[0])
        return args[0]
    if name in DEMANDS:
        raise _demanded(sheet, func, args, kwargs)
    known: dict[int, torch.Tensor] = {}
    metas: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def to_meta(tensor: torch.Tensor) -> torch.Tensor:
        meta = _meta_of(tensor)
        known[id(meta)] = tensor
        metas.append((tensor, meta, meta._version))
        return meta

    with torch.inference_mode(False):
        inner, options = mapped(args, to_meta), mapped(kwargs, to_meta)
    first = next(ghost for _, ghost in located((args, kwargs), Ghost))
    before = device = _spec(first).device
    run = func
    if name in MOVES or "device" in options:
        inner, options, device = _placed(name, args, inner, options, device)
    if name in MOVES - {"type", "to"}:
        run, options = torch.Tensor.to, {"dtype": inner[0].dtype}
    if device != before:
        options = {**options, "copy": True} if run is torch.Tensor.to else options
    try:
        with torch.inference_mode(False), torch.no_grad():
            result = run(*inner, **options)
    except Exception as error:
        raise _demanded(sheet, func, args, kwargs, error) from None
    for tensor, meta, version in metas:
        if meta._version != version:
            if type(tensor) is not Ghost:
                raise sheet.failed(
                    CutError(
                        f"{name}(...) writes {first.source} into another tensor in place, before the cut. What is not "
                        "computed cannot be written. Cut at a later submodule."
                    )
                )
            sheet.touched.add(_memory(meta))
    versions = tuple(
        (tensor, tensor._version) for tensor, _, _ in metas if type(tensor) is not Ghost and not tensor.is_inference()
    )
    places = {id(leaf): place for place, leaf in located(result)}
    around, chance = around_now(before), chance_now(name, args, kwargs, before)

    def to_ghost(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in known:
            return known[id(tensor)]
        spec, memory = spec_of(tensor)._replace(device=device), _memory(tensor)
        others = [(one, meta) for one, meta, _ in metas if type(one) is Ghost and _memory(meta) != memory]
        written = tuple((one, meta._version) for one, meta in others)
        source = Derived(func, args, kwargs, places[id(tensor)], versions, written, around, chance)
        sheet.derived = True
        return Ghost(sheet, spec, source, tensor)

    return mapped(result, to_ghost)


def _placed(
    name: str, args: tuple[Any, ...], inner: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any], torch.device]:
    """Leave the device out of an operation, and say which one it is."""
    options = dict(options)
    if options.get("device") is not None:
        device = torch.device(options["device"])
        options["device"] = "meta"
    if name == "cpu":
        return inner[:1], {}, torch.device("cpu")
    if name in ("cuda", "xpu"):
        given = args[1] if len(args) > 1 else None
        place = name if given is None else f"{name}:{given}" if isinstance(given, int) else given
        return inner[:1], {}, torch.device(place)
    if name == "to":
        rest: list[Any] = []
        for given, meta in zip(args[1:], inner[1:], strict=True):
            if isinstance(given, torch.Tensor):
                device = given.device
                rest.append(meta)
            elif isinstance(given, (torch.device, str)):
                device = torch.device(given)
            else:
                rest.append(meta)
        inner = (inner[0], *rest)
        if len(inner) == 1 and not {"dtype", "other", "memory_format"} & set(options):
            options.pop("device", None)
            options["dtype"] = inner[0].dtype
    return inner, options, device


def _demanded(
    sheet: Sheet, func: Callable[..., Any], args: Any, kwargs: Any, error: Exception | None = None
) -> CutError:
    names = sorted({str(ghost.source) for _, ghost in located((args, dict(kwargs)), Ghost)})
    first = [] if error is None else str(error).strip().splitlines()[:1]
    why = "" if error is None else f" ({type(error).__name__}: {''.join(first)})"
    return sheet.failed(
        CutError(
            f"before the cut, the model's own code asks for values of {' and '.join(names)} by {name_of(func)}(...)"
            f"{why}, but on a resumed call they are not computed. Cut at an earlier submodule, whose input comes "
            "before that, or at a later one inside of which that is done."
        )
    )


# --- values ---------------------------------------------------------------------------------------------


def _force(ghost: Ghost) -> torch.Tensor:
    """The value of a ghost: bound, stored, or worked out of such."""
    if ghost.value is not None:
        return ghost.value
    sheet, source = ghost.sheet, ghost.source
    if isinstance(source, Origin):
        return ghost.bind(sheet.value_of(source, ghost))  # as it is at the cut, whatever was written into it before
    if ghost.meta is not None and _memory(ghost.meta) in sheet.touched:
        raise sheet.failed(
            CutError(
                f"{source} was written in place before the cut and is used again after it by another name. Its "
                "value at that time is not stored. Cut at a later submodule."
            )
        )
    like = name_of(source.func) in LIKE
    changed = any(tensor._version != version for tensor, version in source.versions)
    if changed or (not like and any(other.is_written(before) for other, before in source.written)):
        raise sheet.failed(CutError(f"{source} is used after the cut, but what it is made of was changed meanwhile."))
    if source.chance is not None and not torch.equal(source.chance, chance_of(_spec(ghost).device)):
        raise sheet.failed(
            CutError(
                f"{source} is drawn by chance before the cut and used after it, and others were drawn in between, so "
                "it would come out otherwise. Cut at an earlier submodule, or draw it after the cut."
            )
        )
    with under(source.around):
        if like:
            result = _like(source.func, source.args, dict(source.kwargs))
        else:
            result = source.func(*mapped(source.args, unwrapped), **mapped(dict(source.kwargs), unwrapped))
    return ghost.bind(dict(located(result))[source.place])


def _memory(meta: torch.Tensor) -> int:
    return int(meta.untyped_storage()._cdata)
