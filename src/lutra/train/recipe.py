"""Recipes: which layer gets which method. One frozen dataclass per method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, get_args

from lutra.errors import LutraError
from lutra.ops.limits import (
    CENTROID_COUNTS,
    FUNCTION_ENTRIES,
    INT8_MAX,
    LOOKUP_ACT_BITS,
    LOWBIT_GROUPS,
    MAX_ACT_BITS,
    MAX_SUBVECTOR,
    MAX_WEIGHTS,
    MIN_WEIGHTS,
)
from lutra.ops.lowbit_storage import BITS, TERNARY
from lutra.train.parts import Distance, Group

Gradient = Literal["projected", "straight-through", "dense", "soft"]
CentroidUpdate = Literal["average", "gradient"]
EncoderName = Literal["nearest", "tree"]
TableKind = Literal["learned", "linear", "free"]
Rounding = Literal["calibrated", "nearest", "absmean"]

#: Activation indices that a lookup layer may have.
LOOKUP_LEVELS = tuple(1 << bits for bits in LOOKUP_ACT_BITS)


class Method:
    """The settings that a recipe gives a layer. A subclass registers itself by its name in JSON:
    `class PQ(Method, name="pq")`; its fields are JSON values."""

    name: ClassVar[str]

    def __init_subclass__(cls, *, name: str) -> None:
        known = _METHODS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise LutraError(f"recipe: two methods have the name {name!r}; choose another")
        cls.name = name
        _METHODS[name] = cls

    def settings(self) -> dict[str, Any]:
        """The fields by name, as JSON holds them; without an `otherwise` or `smooth` of None."""
        entries: Any = self
        settings = dataclasses.asdict(entries)
        if settings.get(_SMOOTH, False) is None:
            settings.pop(_SMOOTH)
        if _OTHERWISE in settings:
            other: Method | None = entries.otherwise
            settings.pop(_OTHERWISE)
            if other is not None:
                settings[_OTHERWISE] = _entry(other)
        return settings

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Method:
        """The inverse of `settings`.

        Raises:
            LutraError: an `otherwise` with an unknown method.
            TypeError: a setting that the method does not have.
        """
        entries = dict(settings)
        if isinstance(entries.get(_OTHERWISE), Mapping):
            entries[_OTHERWISE] = _method(_OTHERWISE, entries[_OTHERWISE])
        return cls(**entries)


_OTHERWISE = "otherwise"  # the setting that says what a layer becomes that the method cannot have
_SMOOTH = "smooth"


def _check_otherwise(owner: str, other: Any) -> None:
    """Raises LutraError unless this is None or a method of layers."""
    if other is not None and (not isinstance(other, Method) or isinstance(other, Function)):
        raise LutraError(
            f"{owner}: otherwise={other!r} is no method of layers; give Int8(), Lookup(...), "
            "LowBit(...), PQ(...) or Keep()"
        )


def _check_smooth(owner: str, smooth: Any) -> None:
    """Raises LutraError unless this is None or False."""
    if smooth is not None and smooth is not False:
        raise LutraError(
            f"{owner}: smooth={smooth!r} is neither None nor False; leave it out to let "
            "calibration choose"
        )


_METHODS: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Keep(Method, name="keep"):
    """Leave the layer as it is."""

    reason: str = "the recipe keeps it"


@dataclass(frozen=True)
class PQ(Method, name="pq"):
    """Product quantisation of a layer's input (LUT-NN, arXiv 2302.03213).

    Args:
        v: values in a sub-vector, 1..64. None takes the choice of LUT-NN: the area of the kernel
            for a convolution (the patch of one channel), 4 for 1x1 convolutions and linear layers.
            With group="row" it is the width of the kernel, with "pixel" 4.
        k: centroids in a codebook: 8, 16, 32 or 64.
        act_bits: bits of the activation grid, 1..7.
        gradient: how the gradient of the input is computed. "straight-through" takes the gradient
            of the dense layer; "projected" takes the gradient of the best linear model of the
            quantiser (see `lutra.train.layers.pq_projection`); both have the exact gradient of the
            tables. "dense" passes the gradients of the dense layer to input and weights and none to
            the codebooks, which `reconstruction` trains (eLUT-NN, ASPLOS 2024). "soft" is the
            softmax of LUT-NN over distances, with a learned temperature.
        group: what the sub-vectors of a convolution are cut from. "patch": the whole row, in the
            order (channel, kernel row, kernel column). "row": a row of the kernel, so that with
            v=None a code is of one channel, and is made once for all `kh` kernel rows that it is
            in. "pixel": the channels of a pixel, whose codes serve all `kh * kw` places of the
            kernel. Finding codes then costs a part of the time. Linear layers and kernels of one
            pixel have one group only. Not with the soft gradient, nor with centroids="average".
        free_tables: whether tables are trained beyond the products of centroids and weights, where
            they begin. Calibration can then fit them to the dense network. None: trees only, which
            have no other tables. Files of free tables cannot be stored as compact tables.
        weight_bits: 8 lets tables be products of weights of 8 bits, with a step for each output,
            from calibration on. They are what `export(..., tables="compact")` writes, so such a
            file then has the tables that were trained; with None it rounds the weights at the end,
            which costs accuracy. Not with free tables.
        reconstruction: weight of the mean squared difference between the layer and its dense
            product in the loss (see `lutra.train.reconstruction_loss`); eLUT-NN takes 1e-3 for
            BERT. 0 leaves it out.
        centroids: "average" lets centroids follow the mean of their cluster (exponential moving
            average); "gradient" trains them by backpropagation.
        decay: decay of the moving average in a step.
        temperature: initial softmax temperature of the soft gradient (LUT-NN starts at 0.065).
        encoder: how codes are found. "nearest" searches the nearest centroid; "tree" asks a
            decision tree, as in MADDNESS (arXiv 2106.10860): log2(k) comparisons instead of k * v
            products, for some accuracy (see docs/training.md). Not with the soft gradient.
        distance: which centroid is the nearest: "l2"; "l1", by the sum of absolute differences; or
            "chebyshev", by the largest of them. These two need no multiplier in a circuit
            (LUT-DLA, arXiv 2501.10658), cost accuracy, and take longer on a CPU (see
            docs/hardware.md). Not with trees, nor with the soft gradient.
        otherwise: what a layer becomes that cannot be looked up: a grouped convolution, one with
            another padding than zeros on both sides alike, one that is too deep, an embedding.
            None makes these an error.

    Raises:
        LutraError: a value is out of range.

    Examples:
        >>> from lutra.train import PQ, Int8
        >>> recipe = {"conv1": Int8(), "layer?.*": PQ(v=9), "fc": PQ(v=4, encoder="tree")}
        >>> recipe["layer?.*"].k
        16
    """

    v: int | None = None
    k: int = 16
    act_bits: int = 6
    gradient: Gradient = "projected"
    centroids: CentroidUpdate = "gradient"
    decay: float = 0.99
    temperature: float = 0.065
    encoder: EncoderName = "nearest"
    group: Group = "patch"
    reconstruction: float = 0.0
    free_tables: bool | None = None
    otherwise: Method | None = None
    distance: Distance = "l2"
    weight_bits: int | None = None

    @property
    def has_free_tables(self) -> bool:
        """Whether tables are more than products of centroids and weights."""
        return self.encoder == "tree" if self.free_tables is None else self.free_tables

    def __post_init__(self) -> None:
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise LutraError(f"PQ: {what}")

        for name in ("v", "k", "act_bits"):
            value = getattr(self, name)
            optional = name == "v" and value is None
            require(optional or type(value) is int, f"{name}={value!r} is not an integer")
        for name in ("decay", "temperature", "reconstruction"):
            value = getattr(self, name)
            require(isinstance(value, int | float), f"{name}={value!r} is not a number")
        require(
            self.v is None or 1 <= self.v <= MAX_SUBVECTOR,
            f"v={self.v} is not in 1..{MAX_SUBVECTOR}; choose a sub-vector length in that range",
        )
        require(self.k in CENTROID_COUNTS, f"k={self.k} is not one of {list(CENTROID_COUNTS)}")
        require(
            1 <= self.act_bits <= MAX_ACT_BITS,
            f"act_bits={self.act_bits} is not in 1..{MAX_ACT_BITS}",
        )
        require(
            self.gradient in get_args(Gradient),
            f"gradient={self.gradient!r} is not one of {list(get_args(Gradient))}",
        )
        require(
            self.centroids in ("average", "gradient"),
            f"centroids={self.centroids!r} is not 'average' or 'gradient'",
        )
        require(
            self.encoder in get_args(EncoderName),
            f"encoder={self.encoder!r} is not one of {list(get_args(EncoderName))}",
        )
        require(
            self.encoder == "nearest" or self.gradient != "soft",
            "gradient='soft' is of distances, which encoder='tree' does not compute; "
            "choose 'projected' or 'straight-through'",
        )
        require(
            self.distance in get_args(Distance),
            f"distance={self.distance!r} is not one of {list(get_args(Distance))}",
        )
        require(
            self.distance == "l2" or self.encoder == "nearest",
            f"distance={self.distance!r} is of centroids, and encoder={self.encoder!r} searches "
            "none; leave one of the two out",
        )
        require(
            self.distance == "l2" or self.gradient != "soft",
            f"distance={self.distance!r} has no soft gradient; choose 'projected' or "
            "'straight-through'",
        )
        require(
            self.group in get_args(Group),
            f"group={self.group!r} is not one of {list(get_args(Group))}",
        )
        require(
            self.group == "patch" or self.gradient != "soft",
            f"group={self.group!r} has no soft gradient; choose 'projected' or 'straight-through'",
        )
        require(
            self.group == "patch" or self.centroids == "gradient",
            f"group={self.group!r} has no moving averages; choose centroids='gradient'",
        )
        require(
            0.0 <= self.reconstruction < float("inf"),
            f"reconstruction={self.reconstruction} is not a weight; give 0 or more",
        )
        require(
            self.gradient != "dense" or self.reconstruction > 0.0 or self.centroids == "average",
            "gradient='dense' trains no codebooks; set reconstruction (eLUT-NN takes 1e-3), or "
            "centroids='average'",
        )
        require(
            self.weight_bits is None or (type(self.weight_bits) is int and self.weight_bits == 8),
            f"weight_bits={self.weight_bits!r} is neither 8 nor None",
        )
        require(
            self.weight_bits is None or not self.has_free_tables,
            f"weight_bits={self.weight_bits} is of tables that are products of weights, and free "
            "tables (free_tables=True, or trees by default) are more; set free_tables=False",
        )
        require(0.0 <= self.decay < 1.0, f"decay={self.decay} is not in [0, 1)")
        require(0.0 < self.temperature < 1.0, f"temperature={self.temperature} is not in (0, 1)")
        _check_otherwise("PQ", self.otherwise)


@dataclass(frozen=True)
class Int8(Method, name="int8"):
    """Integer arithmetic for a layer that stays dense: first convolution, depthwise, classifier.

    Weights become int8 with a scale per output channel, activations a grid that calibration finds;
    the sums are exact.

    Args:
        act_bits: bits of the activation grid, 1..7.
        otherwise: what a layer becomes that cannot be computed so, as of `PQ`.
        smooth: None lets calibration divide the features of a linear layer's input by factors, and
            multiply the weights that meet them, wherever that lowers the error well (SmoothQuant,
            arXiv 2211.10438); False never does.

    Raises:
        LutraError: a value is out of range.

    Examples:
        >>> from lutra.train import Int8, recipe_to_json
        >>> recipe_to_json({"fc": Int8()})
        {'fc': {'method': 'int8', 'act_bits': 7}}
    """

    act_bits: int = MAX_ACT_BITS
    otherwise: Method | None = None
    smooth: bool | None = None

    def __post_init__(self) -> None:
        if type(self.act_bits) is not int or not 1 <= self.act_bits <= MAX_ACT_BITS:
            raise LutraError(
                f"Int8: act_bits={self.act_bits!r} is not an integer in 1..{MAX_ACT_BITS}; "
                f"leave it out for {MAX_ACT_BITS}"
            )
        _check_otherwise("Int8", self.otherwise)
        _check_smooth("Int8", self.smooth)


@dataclass(frozen=True)
class LowBit(Method, name="lowbit"):
    """Weights of 1 to 4 bits in linear layers, and activations in int8, row by row.

    Products are lookups in tables of activation sums, or multiplications, whichever is faster for
    the number of rows (see docs/low-bit.md); the sums are exact.

    Args:
        bits: of a weight: 1, 1.58 (ternary: -1, 0, 1), 2, 3 or 4.
        group: neighbouring weights of an output that share a scale: 32, 64 or 128, which has to
            divide the inputs of the layer. None: all weights of an output.
        rounding: how weights become codes. "calibrated": scales by the error of the outputs on the
            calibration data; with sequential calibration weights are then fitted to the dense
            network and rounded one after the other, each making good the errors before it (GPTQ,
            arXiv 2210.17323). "nearest": scales by the error of the weights alone. The scales of
            both are learned in training. "absmean", of 1 and 1.58 bits: the scale is the mean
            magnitude of the weights, in training too (BitNet b1.58, arXiv 2402.17764): for models
            that are trained with such weights.
        zero_points: whether the codes of a group need not be symmetric around zero; of 2 to 4 bits.
        otherwise: what a layer becomes that cannot have such weights (a convolution, an embedding,
            inputs that the group does not divide), as of `PQ`.

    Raises:
        LutraError: a value is out of range.

    Examples:
        >>> from lutra.train import Int8, LowBit
        >>> recipe = {"head": Int8(), "*": LowBit(4, group=32, otherwise=Int8())}
        >>> recipe["*"].bits
        4
    """

    bits: float = TERNARY
    group: int | None = None
    rounding: Rounding = "calibrated"
    zero_points: bool = False
    otherwise: Method | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise LutraError(f"LowBit: {what}")

        require(
            not isinstance(self.bits, bool) and self.bits in BITS,
            f"bits={self.bits!r} is not one of {list(BITS)}",
        )
        require(
            self.group is None or (type(self.group) is int and self.group in LOWBIT_GROUPS),
            f"group={self.group!r} is not one of {list(LOWBIT_GROUPS)} or None",
        )
        kinds = list(get_args(Rounding))
        require(self.rounding in kinds, f"rounding={self.rounding!r} is not one of {kinds}")
        require(
            self.rounding != "absmean" or self.bits in (1, TERNARY),
            f"rounding='absmean' is of 1 and 1.58 bits, not of {self.bits:g}; choose 'calibrated' "
            "or 'nearest'",
        )
        require(
            type(self.zero_points) is bool, f"zero_points={self.zero_points!r} is not True or False"
        )
        require(
            not self.zero_points or self.bits not in (1, TERNARY),
            f"zero_points=True is of 2 to 4 bits, not of {self.bits:g}",
        )
        _check_otherwise("LowBit", self.otherwise)


@dataclass(frozen=True)
class Lookup(Method, name="lookup"):
    """Learned tables of activation index and weight index (Deep Lookup Network, arXiv 2509.13662).

    Every product of an activation and a weight becomes a read from one small table per layer.

    Args:
        levels: activation indices N_f: 4, 8, 16, 32 or 64.
        weights: weight indices N_w, odd, 3..33. (16, 15) is 4 bits, (8, 7) 3 bits, (4, 3) 2 bits.
        table: "learned" is the outer product of a monotone table of activations and one of weights,
            or a mean of `rank` such products; "free" learns every cell by itself; "linear" keeps
            the products of a uniform quantisation.
        rank: products whose mean is the learned table. 1 is a non-uniform quantisation of both
            operands and trains at the cost of the dense layer; more are not.
        entries: the int8 value of the table entry of the largest activation and weight. Smaller
            entries are faster, larger ones finer. None takes the largest multiple of the exact
            products for which the kernels add up several entries at a time.
        temperature: of the softmax behind the learned table, at the start and at the end of
            fine-tuning; between them it changes geometrically.
        rescale: whether the gradient of an entry is divided by the square root of the number of
            its reads, so that rare entries learn as fast as frequent ones (LLT, CVPR 2022).
        otherwise: what a layer becomes that cannot be looked up, as of `PQ`.
        smooth: whether calibration may divide features by factors, as of `Int8`.

    Raises:
        LutraError: a value is out of range.

    Examples:
        >>> from lutra.train import Int8, Lookup
        >>> recipe = {"conv1": Int8(), "layer3.*": Lookup(8, 7), "*": Lookup()}  # 3 and 4 bits
        >>> recipe["*"].levels, recipe["*"].weights
        (16, 15)
    """

    levels: int = 16
    weights: int = 15
    table: TableKind = "learned"
    rank: int = 1
    entries: int | None = None
    temperature: tuple[float, float] = (1.0, 1.0)
    rescale: bool = True
    otherwise: Method | None = None
    smooth: bool | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise LutraError(f"Lookup: {what}")

        for name in ("levels", "weights", "rank"):
            value = getattr(self, name)
            require(type(value) is int, f"{name}={value!r} is not an integer")
        require(
            self.levels in LOOKUP_LEVELS,
            f"levels={self.levels} is not one of {list(LOOKUP_LEVELS)}",
        )
        require(
            MIN_WEIGHTS <= self.weights <= MAX_WEIGHTS and self.weights % 2 == 1,
            f"weights={self.weights} is not an odd number in {MIN_WEIGHTS}..{MAX_WEIGHTS}",
        )
        kinds = list(get_args(TableKind))
        require(self.table in kinds, f"table={self.table!r} is not one of {kinds}")
        require(1 <= self.rank <= 8, f"rank={self.rank} is not in 1..8")
        require(
            self.rank == 1 or self.table == "learned",
            f"rank={self.rank} is of table='learned', not of table={self.table!r}",
        )
        require(
            self.entries is None or (type(self.entries) is int and 1 <= self.entries <= INT8_MAX),
            f"entries={self.entries!r} is not an integer in 1..{INT8_MAX}",
        )
        ends = self.temperature
        require(
            isinstance(ends, tuple | list)
            and len(ends) == 2
            and all(isinstance(t, int | float) and 0.0 < t <= 100.0 for t in ends),
            f"temperature={ends!r} is not a pair of numbers in (0, 100]",
        )
        object.__setattr__(self, "temperature", (float(ends[0]), float(ends[1])))  # JSON has lists
        _check_otherwise("Lookup", self.otherwise)
        _check_smooth("Lookup", self.smooth)

    @property
    def act_bits(self) -> int:
        """Bits of an activation index."""
        return self.levels.bit_length() - 1


_FIT = "fit"  # the name of the setting `method` of a `Function` in JSON
#: How the tables of functions may be fitted.
FUNCTION_METHODS = ("minimax", "dp", "uniform", "exponential", "relu_net")
#: The functions that are swapped unless a recipe names others.
FUNCTIONS = (
    "gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "softplus", "elu", "sigmoid", "tanh", "erf",
    "softmax", "attention", "layer_norm", "rms_norm",
)  # fmt: skip
#: Functions without asymptotes: a table of them is for the range of the calibration data only.
RANGED_FUNCTIONS = ("exp", "sqrt", "rsqrt", "reciprocal")


@dataclass(frozen=True)
class Function(Method, name="function"):
    """Tables of straight lines for functions: activations, softmax and norms (NN-LUT, DAC 2022).

    A pattern with it names any module: one that is a function (`nn.GELU`), or one whose forward
    calls functions (`F.gelu`, `torch.softmax`, `F.scaled_dot_product_attention`, ...); what it
    holds follows it unless another pattern names that. Patterns of layers and of functions do not
    see each other: `{"*": PQ(), "**": Function()}` does both to a whole model.

    Args:
        entries: lines of a table: 8, 16 or 32.
        method: "minimax", "dp", "uniform" or "exponential" of `lutra.functions.fit`, or
            "relu_net", NN-LUT's trained network.
        calibrate: fit each table to the inputs that its place has in the calibration data, and not
            to all inputs alike. Far from these inputs the error is larger, but bounded.
        functions: the functions that are swapped. "exp", "sqrt", "rsqrt" and "reciprocal" can be
            named too where calibration gives them a range; beyond it they are constant.

    Raises:
        LutraError: a value is unknown.

    Examples:
        >>> import torch
        >>> from lutra.train import Function, convert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
        >>> swapped, report = convert(model, {"**": Function()}, [torch.randn(256, 4)])
        >>> [(entry.name, entry.function, entry.entries) for entry in report.functions]
        [('1', 'gelu', 16)]
    """

    entries: int = 16
    method: Literal["minimax", "dp", "uniform", "exponential", "relu_net"] = "minimax"
    calibrate: bool = True
    functions: tuple[str, ...] = FUNCTIONS

    def __post_init__(self) -> None:
        if type(self.entries) is not int or self.entries not in FUNCTION_ENTRIES:
            raise LutraError(
                f"Function: entries={self.entries!r} is not one of {list(FUNCTION_ENTRIES)}"
            )
        if self.method not in FUNCTION_METHODS:
            raise LutraError(
                f"Function: method={self.method!r} is not one of {list(FUNCTION_METHODS)}"
            )
        if type(self.calibrate) is not bool:
            raise LutraError(f"Function: calibrate={self.calibrate!r} is not True or False")
        given: Any = self.functions
        names = (given,) if isinstance(given, str) else tuple(given)
        known = (*FUNCTIONS, *RANGED_FUNCTIONS)
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise LutraError(f"Function: functions={list(names)} must be some of {list(known)}")
        ranged = [name for name in names if name in RANGED_FUNCTIONS]
        if ranged and not self.calibrate:
            raise LutraError(
                f"Function: the range of {', '.join(ranged)} comes from calibration data; set "
                "calibrate=True"
            )
        object.__setattr__(self, "functions", names)  # JSON has lists

    def settings(self) -> dict[str, Any]:
        """The fields, with `method` under another name: in JSON that says which class it is."""
        entries = super().settings()
        entries[_FIT] = entries.pop("method")
        return entries

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Function:
        """The inverse of `settings`."""
        entries = dict(settings)
        if _FIT in entries:
            entries["method"] = entries.pop(_FIT)
        return cls(**entries)


Recipe = Mapping[str, Method]


def match(recipe: Recipe, *names: str) -> Method:
    """The method of the first pattern (a shell-style glob) that fits a module path.

    Args:
        recipe: The patterns.
        names: The path; several where the model holds the module in several places.
    """
    for pattern, method in recipe.items():
        if fits(pattern, *names):
            return method
    return Keep("no pattern of the recipe names it")


def fits(pattern: str, *names: str) -> bool:
    """Whether a pattern matches one of these names."""
    return any(fnmatchcase(name, pattern) for name in names)


def recipe_to_json(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """A recipe as plain JSON values, in the order of its patterns."""
    return {pattern: _entry(method) for pattern, method in recipe.items()}


def recipe_from_json(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Method]:
    """The recipe that `recipe_to_json` wrote.

    Raises:
        LutraError: unknown method or setting.
    """
    if not isinstance(data, Mapping):
        raise LutraError(
            f"recipe: it is a {type(data).__name__}; give an object with a method for each pattern"
        )
    recipe: dict[str, Method] = {}
    for pattern, entry in data.items():
        try:
            recipe[pattern] = _method(f"recipe: pattern {pattern!r}", entry)
        except TypeError as error:
            raise LutraError(f"recipe: pattern {pattern!r}: {error}") from None
    return recipe


def _entry(method: Method) -> dict[str, Any]:
    """A method as plain JSON values."""
    return {"method": method.name, **method.settings()}


def _method(where: str, entry: object) -> Method:
    """The method that `_entry` wrote, or of which only the name is given.

    Args:
        where: what has it, for errors.
        entry: the JSON value.
    """
    settings = dict(entry) if isinstance(entry, Mapping) else {"method": entry}
    name = settings.pop("method", None)
    method = _METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise LutraError(f"{where} has the method {name!r}; choose one of {sorted(_METHODS)}")
    return method.from_settings(settings)
