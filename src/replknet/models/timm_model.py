"""What timm asks of a network that is a row of stages: features, classifier, checkpointing.

A family of networks subclasses `StagedNet` and builds the parts; TorchScript and torch.fx read what is here.
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
    """A block that is computed again in the backward pass; the second time its batch norms count nothing."""
    if torch.compiler.is_compiling():
        # the compiler recomputes values only, and takes no such contexts
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept(block)))


class Stage(nn.Module):
    """Blocks at one resolution, run one after the other.

    RepLKNet's are pairs of a large-kernel block (even index) and a feed-forward block (odd).

    `norm` is applied to the features that leave the network here, not to what goes on to the next stage.
    """

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108  # TorchScript leaves it out
                x = _checkpointed(block, x)
            else:
                x = block(x)
        return x


class StagedNet(nn.Module):
    """A stem, stages with transitions between them, a final norm and a classifier, as timm's models are used.

    A subclass builds `stem`, `stages`, `transitions` (one after each stage), `norm`, `global_pool`, `head_drop` and
    `head`, and says `feature_info`, `last_stage` (its number, also where stages are dropped later), `num_features`
    (channels of the last stage) and `head_hidden_size` (channels that the classifier sees).

    Input: images `[N,in_chans,H,W]`, the dtype of the parameters.
    Output: logits `[N,num_classes]`, or pooled features with num_classes=0.
    """

    if TYPE_CHECKING:  # TorchScript would read these at run time
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
        """Parameters that must not decay beyond what every recipe exempts (biases and norms): none."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass, which saves memory and costs a forward pass.

        Args:
            enable: False goes back to keeping them.
        """
        for stage in self.stages.children():
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The initial values anew, such as for a network that was built on the meta device and then `to_empty`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer: nn.Linear, or nn.Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, and a new pooling if one is named.

        Args:
            num_classes: its outputs; 0 for none.
            global_pool: timm's name of the pooling; None for the one there is.
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
        """Images `[N,in_chans,H,W]` to the normalised map before pooling, `[N,C,H/32,W/32]` with a stride of 32."""
        for layer in self.stem:
            x = layer(x)
        for stage, after in zip(self.stages, self.transitions):  # noqa: B905  # TorchScript has no strict=
            x = after(stage(x))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map `[N,C,h,w]` to logits, or to the pooled features before them."""
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
            indices: stages to take; the last n for a number, all for None.
            norm: apply the final norm to the last stage's features.
            stop_early: leave out the stages after the last one that is taken.
            output_fmt: "NCHW".
            intermediates_only: leave out the final map.

        Returns:
            The features `[N,C_i,H/r_i,W/r_i]`, after the stage's own norm if it has one; before them the
            final map, unless `intermediates_only`.

        Raises:
            ValueError: another `output_fmt`, or `indices` without any stage.
        """
        if not torch.jit.is_scripting():
            _refuse_other_formats(output_fmt)
        taken, last = _taken(len(self.stages), indices)
        end = last + 1 if stop_early else len(self.stages)
        found: list[Tensor] = []
        for layer in self.stem:
            x = layer(x)
        # TorchScript unrolls this loop, and can neither slice the lists nor leave it
        for i, (stage, after) in enumerate(zip(self.stages, self.transitions)):  # noqa: B905  # nor has it strict=
            if i < end:
                x = stage(x)
                if i in taken:
                    final = norm and i == self.last_stage
                    # a module's attribute may be a tensor, too, for mypy
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
        """Drop the layers that features of these stages do not need; returns the stages as numbers from 0."""
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
        # what is new, the lists too, is in the mode of the network
        for new in (self.stages, self.transitions, self.transitions[-1]):
            new.training = self.training
        return taken


def _taken(stages: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """timm's reading of `indices`: the stages to take, as numbers from 0, and the last of them."""
    if not torch.jit.is_scripting():
        _refuse_none(stages, indices)
    taken, last = feature_take_indices(stages, indices)
    return taken, last


def _refuse_other_formats(output_fmt: str) -> None:
    if output_fmt != "NCHW":
        raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")


def _refuse_none(stages: int, indices: int | list[int] | None) -> None:
    if not isinstance(indices, int | None) and not indices:
        raise ValueError(f"indices must name one of the {stages} stages at least, got {indices}; None takes all")


def changed(cfg: Config, kwargs: dict[str, Any]) -> Config:
    """A configuration with those of its fields that are among the arguments, which are taken out of them."""
    named = [field.name for field in fields(cfg) if field.name in kwargs]  # type: ignore[arg-type]  # a dataclass
    return replace(cfg, **{name: kwargs.pop(name) for name in named})  # type: ignore[type-var]  # the same


def on_device(device: torch.device | str | None) -> AbstractContextManager[object]:
    """Layers that are built inside are on that device; None for the default one."""
    return nullcontext() if device is None else torch.device(device)


def linear(last: float, count: int) -> list[float]:
    """`count` values from 0 to `last`; plain numbers, so that a model can be built on the meta device."""
    return [last * i / max(1, count - 1) for i in range(count)]
