"""Small adapters in SAM's frozen trunk (Houlsby et al. 2019, arXiv 1902.00751): does the gap come from SAM?

SAM's own weights stay as they are. Behind each block of the trunk's later part a bottleneck adds to what the block
says, nothing at the start. They are tuned as the fuser is: on the same questions, by the same losses.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import nn

from samantics.incontext.tokens import SamData, SamMaps, mask_tokens, trunk_blocks


class Adapters(nn.Module):
    """Bottlenecks of `width` channels behind each of SAM's trunk blocks that follow the first of `maps` trunk maps."""

    def __init__(self, sam: Sam, maps: int, width: int) -> None:
        super().__init__()
        self.maps, self.start, dim = maps, trunk_blocks(sam, maps)[0] + 1, sam.image_encoder.neck[0].in_channels
        self.layers = nn.ModuleList()
        for _ in sam.image_encoder.blocks[self.start :]:
            up = nn.Linear(width, dim)
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
            self.layers.append(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), up))

    def forward(self, sam: Sam, maps: SamMaps) -> SamMaps:
        """SAM's maps with the adapters at work, from the first trunk map, which none of them has touched."""
        state, trunk = maps.trunk[:, 0].permute(0, 2, 3, 1), [maps.trunk[:, 0]]
        for number, (block, layer) in enumerate(
            zip(sam.image_encoder.blocks[self.start :], self.layers, strict=True), start=self.start
        ):
            state = block(state)
            state = state + layer(state)
            if number in trunk_blocks(sam, self.maps):
                trunk.append(state.permute(0, 3, 1, 2))
        return SamMaps(torch.stack(trunk, dim=1), sam.image_encoder.neck(state.permute(0, 3, 1, 2)), maps.inside)


@torch.no_grad()
def adapted(data: SamData, sam: Sam, adapters: Adapters, rows: NDArray[np.int64] | None = None) -> SamData:
    """The data as the adapted SAM sees it; mask tokens only of the objects in `rows`, all others are zero."""

    def maps(images: NDArray[np.int64], mirrored: NDArray[np.bool_] | None = None) -> SamMaps:
        return adapters(sam, data.maps(images, mirrored))

    tokens, boxes = np.zeros_like(data.tokens), torch.from_numpy(data.objects.boxes).to(sam.device)
    for chosen in [] if rows is None else np.array_split(rows, len(rows) // 32 + 1):
        images, which = np.unique(data.objects.image[chosen], return_inverse=True)
        neck = maps(images).neck[torch.from_numpy(which).to(sam.device)]
        tokens[chosen] = mask_tokens(sam, neck, boxes[torch.from_numpy(chosen)]).numpy(force=True)
    return data._replace(maps=maps, tokens=tokens)
