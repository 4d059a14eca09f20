"""timm's interface for a network of stages: features, classifier, gradient checkpointing.

A network family subclasses `StagedNet` and builds the parts. TorchScript and torch.fx read the code in this file.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from timm.layers import create_classifier
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from replknet.nn.conv_bn import statistics_kept

Config = TypeVar("Config")


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block that the backward pass computes again; the second run leaves batch-norm statistics unchanged."""
    if torch.compiler.is_compiling():
        # the compiler recomputes values only, and accepts no such contexts
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept(block)))


class Stage(nn.Module):
    """Blocks at one resolution, run one after the other.

    In a RepLKNet, large-kernel blocks (even index) and feed-forward blocks (odd index) alternate.

    `norm` applies to the features that the network returns, not to the input of the next stage.
    """

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108  # TorchScript skips it
                x = _checkpointed(block, x)
            else:
                x = block(x)
        return x


class StagedNet(nn.Module):
    """A stem, stages with transitions between them, a final norm and a classifier, used like a timm model.

    A subclass builds `stem`, `stages`, `transitions` (one after each stage), `norm`, `global_pool`, `head_drop` and
    `head`. It also sets four facts:

    - `feature_info`: timm's records of the stages;
    - `last_stage`: the last stage's number, which stays when stages are dropped;
    - `num_features`: channels of the last stage;
    - `head_hidden_size`: input channels of the classifier.

    Input: images `[N,in_chans,H,W]`, the dtype of the parameters.
    Output: logits `[N,num_classes]`, or pooled features with num_classes=0.
    """

    if TYPE_CHECKING:  # at run time TorchScript would read these annotations
        cfg: Any
        num_classes: int
        in_chans: int
        num_features: int
        head_hidden_size: int
        feature_info: list[dict[str, Any]]
        last_stage: int
        stem: nn.ModuleList
        stages: nn.ModuleList
        transitions: nn.ModuleList
        norm: nn.Module
        global_pool: Any
        head_drop: nn.Module
        head: nn.Module

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Further parameters without weight decay: none. Recipes already exempt biases and norms."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass. This saves memory and costs a forward pass.

        Args:
            enable: False keeps the activations again.
        """
        for stage in self.stages.children():
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw new initial values, for example after the meta device and `to_empty`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer: nn.Linear, or nn.Identity if there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if one is named.

        Args:
            num_classes: outputs of the classifier; 0 for no classifier.
            global_pool: timm's name of the pooling; None keeps the present one.
        """
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        old = next(self.parameters())
        self.global_pool, self.head = create_classifier(
            self.head_hidden_size, num_classes, pool_type=pool, device=old.device, dtype=old.dtype
        )
        for new in (self.global_pool, self.head):
            new.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map after the final norm, before pooling: images `[N,in_chans,H,W]` to `[N,C,H/32,W/32]` at stride 32."""
        for layer in self.stem:
            x = layer(x)
        for stage, after in zip(self.stages, self.transitions):  # noqa: B905  # TorchScript has no strict=
            x = after(stage(x))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from a map `[N,C,h,w]`, or with `pre_logits` the pooled features before them."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the stages, as timm's models give them.

        Args:
            x: images `[N,in_chans,H,W]`.
            indices: stages to take; a number n takes the last n, None takes all.
            norm: apply the final norm to the last stage's features.
            stop_early: do not run the stages after the last one taken.
            output_fmt: only "NCHW".
            intermediates_only: return the features without the final map.

        Returns:
            (final map, features), or the features alone with `intermediates_only`. The features are a list of
            `[N,C_i,H/r_i,W/r_i]`, each after its stage's own norm if there is one.

        Raises:
            ValueError: `output_fmt` is not "NCHW", or `indices` has no stage.
        """
        if not torch.jit.is_scripting():
            _refuse_other_formats(output_fmt)
        taken, last = _taken(len(self.stages), indices)
        end = last + 1 if stop_early else len(self.stages)
        found: list[Tensor] = []
        for layer in self.stem:
            x = layer(x)
        # TorchScript unrolls this loop: it can neither slice the lists nor leave the loop
        for i, (stage, after) in enumerate(zip(self.stages, self.transitions)):  # noqa: B905  # it has no strict=
            if i < end:
                x = stage(x)
                if i in taken:
                    final = norm and i == self.last_stage
                    # for mypy, a module's attribute may also be a tensor
                    found.append(self.norm(x) if final else stage.norm(x))  # type: ignore[operator]
                if i + 1 < end:
                    x = after(x)
        if intermediates_only:
            return found
        return (self.norm(x) if end > self.last_stage else x), found

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that the features of these stages do not need; returns the stage numbers, from 0."""
        taken, last = _taken(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.transitions = nn.ModuleList([*self.transitions[:last], nn.Identity()])
        if prune_norm or pruned:
            self.norm = nn.Identity().train(self.training)
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        # new modules, lists included, take the network's training mode
        for new in (self.stages, self.transitions, self.transitions[-1]):
            new.training = self.training
        return taken


def _taken(stages: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """Read `indices` as timm does: the numbers of the stages to take, from 0, and the last of them."""
    if not torch.jit.is_scripting():
        _refuse_none(stages, indices)
    taken, last = feature_take_indices(stages, indices)
    return taken, last


def _refuse_other_formats(output_fmt: str) -> None:
    if output_fmt != "NCHW":
        raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")


def _refuse_none(stages: int, indices: int | list[int] | None) -> None:
    if not isinstance(indices, int | None) and not indices:
        raise ValueError(f"indices must name at least one of the {stages} stages, got {indices}; None takes all")


def changed(cfg: Config, kwargs: dict[str, Any]) -> Config:
    """The configuration with fields replaced by `kwargs` of that name; these are removed from `kwargs`."""
    named = [field.name for field in fields(cfg) if field.name in kwargs]  # type: ignore[arg-type]  # a dataclass
    return replace(cfg, **{name: kwargs.pop(name) for name in named})  # type: ignore[type-var]  # a dataclass


def on_device(device: torch.device | str | None) -> AbstractContextManager[object]:
    """A context that builds layers on this device; None: on the default device."""
    return nullcontext() if device is None else torch.device(device)


def linear(last: float, count: int) -> list[float]:
    """`count` values from 0 to `last`: Python numbers, since tensors on the meta device have no values."""
    return [last * i / max(1, count - 1) for i in range(count)]
