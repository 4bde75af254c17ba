"""Mixture-of-experts modules with one ``nn.Linear`` an expert.

transformers keeps all experts of a block in fused 3-D parameters. The layout of a fused module is
taken from what its class declares and from its shapes; where it declares nothing, every layout
that fits the shapes is tried. A layout is used only if a small copy of the module and the experts
made of it give the same numbers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowbitError
from .fused import BIAS, DOWN, GATE, UP, Form, Part, candidates, is_fused_experts, small_copy
from .grouped import Version, chosen, grouped_linear, in_steps, put_back, sent

__all__ = ["Experts", "form_of", "is_fused_experts", "proved", "replace_fused", "unfused"]


class Experts(nn.Module):
    """Experts as modules: children "0", "1", ... with linears ``gate_proj`` (if gated), ``up_proj``
    and ``down_proj``. Modules of the fused module, such as a norm after each expert, keep their
    names.

    Args:
        fused: the module to take parameters from; meta or real. form: what it is.
    """

    def __init__(self, fused: nn.Module, form: Form) -> None:
        super().__init__()
        self.form = form
        # Held in a tuple: not a child, since its children are.
        self._shell = (_emptied(fused),)
        own = fused._parameters
        for number in range(form.count):
            expert = nn.Module()
            for name, part in form.parts.items():
                weight = own[part.parameter]
                bias = own[part.parameter + BIAS] if form.biased else None
                assert weight is not None
                expert.add_module(name, _linear(part, number, weight, bias))
            self.add_module(str(number), expert)
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.train(fused.training)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of what the chosen experts make of each row.

        Args:
            hidden_states: (tokens, hidden); of a form that takes sorted rows (experts * tokens,
                hidden), where rows of zeros are tokens that were not sent to the expert.
            top_k_index: (tokens, k) numbers of experts. top_k_weights: (tokens, k).

        Returns:
            The shape and dtype of ``hidden_states``.
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.form.sorted:
            return self._sorted(rows).view_as(hidden_states)
        assert top_k_index is not None and top_k_weights is not None
        if chosen(self._experts()) == "grouped":
            return self._grouped(rows, top_k_index, top_k_weights).view_as(hidden_states)
        picked = top_k_index.reshape(-1)
        weights = top_k_weights.reshape(-1, 1)
        order = picked.argsort(stable=True)
        total = self.form.count + self.form.identities
        # The one wait for the device: how many rows each expert has.
        counts: list[int] = picked.bincount(minlength=total).tolist()
        # Summed in the dtype of the products, as the runtimes' grouped kernels do.
        dtype = torch.promote_types(rows.dtype, weights.dtype)
        out = rows.new_zeros(rows.shape, dtype=dtype)
        for number, picks in enumerate(torch.split(order, counts)):
            if number < total and picks.numel():
                token = picks // top_k_index.shape[-1]
                made = self._expert(number, rows[token]) * weights[picks]
                out.index_add_(0, token, made.to(dtype))
        return out.to(rows.dtype).view_as(hidden_states)

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """The module that transformers makes, with the numbers of these experts."""
        made = _emptied(self._shell[0])
        made._modules = {n: m for n, m in self._modules.items() if not n.isdigit()}
        made.train(self.training)
        for name, part in self.form.parts.items():
            linears = [self.get_submodule(f"{i}.{name}") for i in range(self.form.count)]
            for kind in ("weight", "bias") if self.form.biased else ("weight",):
                whole = part.parameter + (BIAS if kind == "bias" else "")
                first = linears[0].get_parameter(kind)
                if whole not in made._parameters:
                    zeros = first.new_zeros(self.form.shape(whole))
                    made.register_parameter(whole, nn.Parameter(zeros))
                held = made.get_parameter(whole)
                for one, linear in zip(held, linears, strict=False):
                    view = part.bias(one) if kind == "bias" else part.weight(one)
                    view.copy_(linear.get_parameter(kind))
        return made

    def in_steps(self, device: torch.device) -> Version:
        """How they are computed in steps of tuning, see `grouped`.

        Raises:
            LowbitError: LOWBIT_EXPERTS names no way.
        """
        return in_steps(self._experts(), device)

    def _experts(self) -> list[nn.Module]:
        """The experts, in order."""
        return [self.get_submodule(str(i)) for i in range(self.form.count)]

    def _grouped(self, rows: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden) -> the same, all experts at once."""
        k = top_k_index.shape[-1]
        picked = top_k_index.reshape(-1)
        order = picked.argsort(stable=True)
        inverse = order.argsort()
        experts = torch.arange(self.form.count, dtype=picked.dtype, device=picked.device)
        # Nothing here is read back: a step does not wait for the device.
        ends = torch.searchsorted(picked[order], experts, right=True, out_int32=True)
        x = sent(rows, order, inverse)
        if self.form.identities:
            passed = int(ends[-1])
            made = torch.cat((self._products(x[:passed], ends), x[passed:]))
        else:
            made = self._products(x, ends)
        each = put_back(made, order, inverse).view(-1, k, made.shape[-1])
        dtype = torch.promote_types(rows.dtype, top_k_weights.dtype)
        return (each * top_k_weights.reshape(-1, k, 1)).to(dtype).sum(1).to(rows.dtype)

    def _products(self, x: Tensor, ends: Tensor) -> Tensor:
        """What experts make of their rows, (rows, hidden), expert after expert; ``ends`` as
        `grouped_linear` takes it.
        """
        experts: list[Any] = self._experts()
        linears = {n: [expert.get_submodule(n) for expert in experts] for n in self.form.parts}
        gate = grouped_linear(x, linears[GATE], ends) if self.form.gated else None
        inner = self._joined(gate, grouped_linear(x, linears[UP], ends))
        return self._normed(grouped_linear(inner, linears[DOWN], ends))

    def _sorted(self, rows: Tensor) -> Tensor:
        """(experts * tokens, hidden) -> the same: expert after expert, rows of zeros left out."""
        used = rows.detach().ne(0).any(-1).nonzero().squeeze(-1)
        each = max(rows.shape[0] // self.form.count, 1)
        if chosen(self._experts()) == "grouped":
            lasts = torch.arange(1, self.form.count + 1, device=used.device) * each
            ends = torch.searchsorted(used, lasts, out_int32=True)
            return torch.zeros_like(rows).index_copy(0, used, self._products(rows[used], ends))
        counts: list[int] = (used // each).bincount(minlength=self.form.count).tolist()
        out = torch.zeros_like(rows)
        for number, picks in enumerate(torch.split(used, counts)):
            if picks.numel():
                out.index_add_(0, picks, self._expert(number, rows[picks]))
        return out

    def _expert(self, number: int, x: Tensor) -> Tensor:
        """What one expert makes of (tokens, hidden)."""
        if number >= self.form.count:
            return x
        expert: Any = self.get_submodule(str(number))
        up = expert.up_proj(x)
        inner = self._joined(expert.gate_proj(x) if self.form.gated else None, up)
        return self._normed(expert.down_proj(inner))

    def _joined(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """What the down projection reads, (rows, inner), of what gate and up make."""
        shell: Any = self._shell[0]
        if gate is None:
            inner: Tensor = shell.act_fn(up)
        elif self.form.gates:
            inner = shell._apply_gate(self.form.join(gate, up))
        else:
            inner = shell.act_fn(gate) * up
        return inner

    def _normed(self, out: Tensor) -> Tensor:
        """What an expert gives, (rows, hidden), of what its down projection makes."""
        shell: Any = self._shell[0]
        normed: Tensor = shell.post_expert_norm(out) if self.form.normed else out
        return normed


def unfused(module: nn.Module) -> Experts:
    """The experts of a fused module as linears of their own, in its dtype and on its device.

    The result computes what the eager forward of the module computes. It shares no parameter with
    the module, apart from those of child modules.

    Raises:
        LowbitError: no layout that is known gives the module's own numbers.
    """
    return Experts(module, form_of(module))


def fuse_again(model: nn.Module) -> None:
    """Put fused modules where `replace_fused` has put experts, in place. Parameters of a choice
    that is no expert are zero.
    """
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, Experts)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.fused())


def replace_fused(model: nn.Module, only: Collection[str] | None = None) -> list[str]:
    """Replace every fused module of a model by its experts, in place.

    Args:
        only: names of the modules that are replaced; None means all.

    Returns:
        Names of the modules replaced, in the model's order.

    Raises:
        LowbitError: the layout of one is not known (named).
    """
    found = [
        (n, m)
        for n, m in model.named_modules()
        if is_fused_experts(m) and (only is None or n in only)
    ]
    forms: dict[tuple[type, tuple[torch.Size, ...]], Form] = {}
    for name, module in found:
        kind = type(module), tuple(p.shape for p in module.parameters(recurse=False))
        try:
            forms[kind] = forms.get(kind) or form_of(module)
        except LowbitError as e:
            raise LowbitError(f"'{name}': {e}") from e
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Experts(module, forms[kind]))
    return [name for name, _ in found]


def form_of(module: nn.Module) -> Form:
    """The form of a fused module, proved on a small copy of it.

    Raises:
        LowbitError: see ``unfused``.
    """
    for form in candidates(module):
        small, shrunk = small_copy(module, form)
        if proved(small, Experts(small, shrunk)):
            return form
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    raise LowbitError(
        f"the experts of {type(module).__name__} lie in a layout that is not known ({shapes}): no "
        "reading of it gives what the module computes."
    )


def proved(fused: nn.Module, made: Experts, tolerance: float = 1e-10) -> bool:
    """Whether experts give the numbers of the fused module's eager forward.

    Args:
        fused: a module in float64 on the CPU. made: of it. tolerance: largest difference allowed,
            relative to the largest output; of a module that sums in float32 whatever its dtype, a
            few roundings of float32.
    """
    form, rng = made.form, torch.Generator().manual_seed(0)
    # On the CPU whatever the default device is: transformers loads models under meta.
    drawn: dict[str, Any] = dict(generator=rng, dtype=torch.float64, device="cpu")
    tokens, choices = 12, form.count + form.identities
    x = torch.randn(tokens, form.hidden, **drawn)
    arguments: tuple[Tensor, ...]
    if form.sorted:
        sent = torch.rand(form.count, tokens, 1, **drawn) < 0.5
        arguments = ((x * sent).reshape(-1, form.hidden),)
    else:
        k = min(3, choices)
        likes = torch.rand(tokens, choices, **drawn)
        likes[0, -1] = 2  # the last choice is an identity if there are any
        picks = likes.topk(k).indices
        weights = torch.rand(tokens, k, **drawn) + 0.1
        arguments = x, picks, weights
    try:
        # Beneath the decorator that dispatches to kernels.
        want = inspect.unwrap(type(fused).forward)(fused, *arguments)
        got = made(*arguments)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False  # such shapes or arguments are not the module's
    size = want.detach().abs().max()
    if torch.equal(want, want.float().double()):
        tolerance = 64 * torch.finfo(torch.float32).eps
    near = want.shape == got.shape and (want - got).abs().max() <= tolerance * size
    return bool(near and size > 0 and size.isfinite())


def _linear(part: Part, number: int, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """One expert's linear of fused parameters, with its own memory."""
    data = part.weight(weight.detach()[number])
    made = nn.Linear(
        data.shape[1], data.shape[0], bias=bias is not None, device="meta", dtype=data.dtype
    )
    made.weight = nn.Parameter(_owned(data), requires_grad=weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(
            _owned(part.bias(bias.detach()[number])), requires_grad=bias.requires_grad
        )
    return made


def _owned(view: Tensor) -> Tensor:
    return view.clone(memory_format=torch.contiguous_format)


def _emptied(module: nn.Module) -> nn.Module:
    """The module without its own parameters, for its methods, settings and children."""
    shell = copy.copy(module)
    shell.__dict__["_parameters"] = {}
    return shell
