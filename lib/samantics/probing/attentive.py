"""The attentive probe: a few learned queries choose which tokens count, then one linear layer names the class.

A mean over space favours objectives that pool by a mean; this probe finds the class wherever it lies. Its budget
(tokens, queries, epochs, rate) is the same for all encoders, and was chosen on the validation artist's drawings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samantics.models.encoder import TOKEN_GRID
from samantics.probing.linear import BATCH, Features, Labels, ProbeResult, batches, checked, joined, scored

QUERIES, EPOCHS, RATE, DECAY = 4, 12, 1e-2, 1.0


class AttentiveProbe(nn.Module):
    """Queries begin near 0, where every token weighs the same: training starts at the mean."""

    def __init__(self, width: int, classes: int, seed: int) -> None:
        super().__init__()
        start = torch.randn(QUERIES, width, generator=torch.Generator().manual_seed(seed))
        self.scale = nn.BatchNorm1d(width, affine=False)  # all encoders in one unit
        self.queries = nn.Parameter(0.02 * start)
        self.norm = nn.BatchNorm1d(QUERIES * width, affine=False)
        self.layer = nn.utils.skip_init(nn.Linear, QUERIES * width, classes)
        nn.init.zeros_(self.layer.weight), nn.init.zeros_(self.layer.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """`(B, classes)` logits of `(B, T * C)` tokens, one after another."""
        tokens = vectors.unflatten(1, (TOKEN_GRID**2, -1))  # (B, T, C)
        tokens = self.scale(tokens.flatten(0, 1)).view_as(tokens)
        weights = (tokens @ self.queries.T).softmax(dim=1)  # (B, T, Q): over the tokens they add up to 1
        logits: Tensor = self.layer(self.norm((weights.mT @ tokens).flatten(1)))
        return logits


def attentive_probe(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, classes: int, seeds: Sequence[int] = (0,),
    epochs: int = EPOCHS,
) -> ProbeResult:  # fmt: skip
    """AdamW with cosine decay, streamed as the linear probe is; nothing is chosen, and test data are looked at once.

    Features are `(N, 36 C)`, of the pooling `tokens`; all else, and the errors, as `linear_probe`.
    """
    train_x, test_x = checked(train_x, train_y, classes, "train"), checked(test_x, test_y, classes, "test")
    results = []
    for seed in seeds:
        probe = AttentiveProbe(train_x.shape[1] // TOKEN_GRID**2, classes, seed)
        _train(probe, train_x, train_y, epochs, seed)
        ranked = np.empty((len(test_y), min(5, classes)), np.int64)
        for rows, vectors in batches(test_x, 512):
            with torch.no_grad():
                ranked[rows] = probe(vectors).topk(ranked.shape[1]).indices.numpy()
        results.append(scored(ranked, test_y))
    return joined(results)


def _train(probe: AttentiveProbe, x: Features, y: Labels, epochs: int, seed: int) -> None:
    optimiser = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    rng, labels = np.random.default_rng(seed), torch.from_numpy(y.astype(np.int64))
    for _ in range(epochs):
        for rows, vectors in batches(x, BATCH, rng=rng):
            if len(rows) == 1:  # batch norm cannot tell one image's spread
                continue
            loss = F.cross_entropy(probe(vectors), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    probe.eval()
