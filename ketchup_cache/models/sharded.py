"""A model in training that is in parts (FSDP2): each process holds its part of every weight, gradient and moment.

A layer's weights are put together while it computes, forward and backward, and its gradient is summed and cut up as
soon as it is there. So the processes meet in every layer, and must make as many passes as each other (`Group.level`).
What needs the whole model besides has it for a time (`Sharded.gather`).
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from ketchup_cache.errors import ModelError
from ketchup_cache.models.forward import MIXED, Batch, longest_mixed, training_states
from ketchup_cache.models.load import layers_of, model_name
from ketchup_cache.models.t5_unpadded import compute_block, is_ragged
from ketchup_cache.parallel.group import group

Precision = Literal["float32", "bfloat16"]


class Sharded:
    """whole: the model itself, without weights but after `gather`. model: a copy, in parts, which is trained. start:
    `states` of another copy, which stays as it is; None unless it was asked for."""

    def __init__(self, whole: PreTrainedModel, device: torch.device, *, keep_start: bool = False) -> None:
        """whole: on the CPU. It loses its weights. device: where the parts are.

        Raises ModelError for a model whose passes depend on the rows, or that does not mark its layers.
        """
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ModelError(f"--fsdp needs PyTorch 2.13 or newer, and this is {torch.__version__}")
        config = whole.config.to_dict()
        if longest_mixed(whole) < math.inf or any(value for key, value in config.items() if "layerdrop" in key):
            what = "makes other passes for other rows (positions by the longest row, layers that are left out)"
            raise ModelError(f"{model_name(whole)}: {what}: leave --fsdp out")
        self.start: Any = None
        if keep_start:
            self.start = _Root(copy.deepcopy(whole).eval().requires_grad_(False), device)
        # the copy takes the weights themselves, so that no process holds them twice
        self.whole, self.model = whole, copy.deepcopy(whole, {id(p): p for p in whole.parameters()})
        empty = {p: nn.Parameter(torch.empty(0, device=device), p.requires_grad) for p in whole.parameters()}
        for module in whole.modules():
            module._parameters |= {name: empty[p] for name, p in module._parameters.items() if p is not None}
            module._buffers |= {name: b.to(device) for name, b in module._buffers.items() if b is not None}
        del empty
        self._root: Any = _Root(self.model, device)
        self._parts, self._held = dict(self.model.named_parameters()), ""

    def states(self, batch: Batch, precision: Precision) -> Tensor:
        """`training_states`. The embeddings and the head stay whole until the backward pass, or `reshard`."""
        return self._root(batch, precision)

    def reshard(self) -> None:
        """After passes without a backward one."""
        for root in (self._root, self.start):
            if root is not None:
                root.reshard()

    @torch.no_grad()
    def gather(self, *, to_write: bool = False) -> None:
        """Put the weights as they are into `whole`, in every process and on its device; `to_write`: in the first alone
        and on the CPU, unless they are there. They stay until `release`."""
        if self._held == "all" or (to_write and self._held):
            return
        self.reshard()
        mine = dict(self.whole.named_parameters())
        for name, part in self._parts.items():
            full = part.full_tensor()
            if not to_write or group().first:
                mine[name].data = full.cpu() if to_write else full
        self._held = "first" if to_write else "all"

    def release(self) -> None:
        """Let go of what was gathered: training has the memory."""
        for weight in self.whole.parameters() if self._held else ():
            weight.data = torch.empty(0, device=weight.device)
        self._held = ""


class _Root(nn.Module):
    """What FSDP knows as the outermost module: the model's own forward pass ends before its head (`head_input`)."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        super().__init__()
        self.model, MIXED[model] = model, math.inf
        how: dict[str, Any] = {"mesh": init_device_mesh(device.type, (group().size,))}
        layers: list[Any] = layers_of(model, "--fsdp")
        for layer in layers:
            fully_shard(layer, **how)
            if is_ragged(model):
                layer.unpadded = partial(compute_block, layer)
                register_fsdp_forward_method(layer, "unpadded")
        for module in (fully_shard(self, **how), *layers):
            module.set_gradient_divide_factor(1.0)  # losses are of the whole step
            module.set_force_sum_reduction_for_comms(True)  # which Gloo can do
            module.set_reduce_scatter_unused_params(True)  # an expert that no row of a process came to

    def forward(self, batch: Batch, precision: Precision) -> Tensor:
        return training_states(self.model, batch, precision)
