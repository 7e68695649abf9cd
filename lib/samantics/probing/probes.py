"""The probes beside the linear one: nearest neighbours, learned queries over all tokens, and CLIP's own prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from samantics.models.encoder import TOKEN_GRID, Encoder
from samantics.models.pocket import WordTokenizer
from samantics.probing.linear import BATCH, Features, Labels, ProbeResult, batches, best_five, checked, scored

TEMPERATURE = 0.07  # neighbours' votes weigh exp(cosine / temperature), as DINOv2's
QUERIES, EPOCHS, RATE, DECAY = 4, 12, 1e-2, 1.0  # of the attentive probe


def knn_probe(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, classes: int, k: int = 10
) -> ProbeResult:
    """The `k` nearest neighbours by cosine vote on the class, nearer ones with more weight; nothing is trained.

    Args:
        train_x, test_x: `(N, C)` features.
        train_y, test_y: `(N,)` class labels from 0.
        classes: number of classes.
        k: neighbours that vote; all, where there are fewer.

    Raises:
        StudyError: as `linear_probe`.
    """
    train_x, test_x = checked(train_x, train_y, classes, "train"), checked(test_x, test_y, classes, "test")
    labels = torch.from_numpy(train_y.astype(np.int64))

    def votes(vectors: Tensor) -> Tensor:
        queries = F.normalize(vectors, dim=1)
        rows, cosines = torch.zeros(len(queries), 0, dtype=torch.int64), torch.zeros(len(queries), 0)
        for numbers, known in batches(train_x, 8192):  # the nearest are found among these and the nearest so far
            found = torch.cat([cosines, queries @ F.normalize(known, dim=1).T], dim=1)
            cosines, order = found.topk(min(k, found.shape[1]), dim=1)
            rows = torch.cat([rows, torch.from_numpy(numbers).expand(len(queries), -1)], dim=1).gather(1, order)
        weights = (cosines / TEMPERATURE).softmax(dim=1).double()
        return weights.new_zeros(len(queries), classes).scatter_add_(1, labels[rows], weights)

    return scored(best_five(votes, test_x, 16384)[None], test_y)


class AttentiveProbe(nn.Module):
    """A few learned queries choose which tokens count, then one linear layer names the class, wherever it lies.

    Queries begin near 0, where every token weighs the same: training starts at the mean.
    """

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
        return self.layer(self.norm((weights.mT @ tokens).flatten(1)))


def attentive_probe(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, classes: int, seeds: Sequence[int] = (0,)
) -> ProbeResult:
    """AdamW with cosine decay, streamed as the linear probe is, on `(N, 36 C)` features of the pooling `tokens`.

    Nothing is chosen: its budget is the same for all encoders, and was chosen on the validation artist's drawings.
    """
    train_x, test_x = checked(train_x, train_y, classes, "train"), checked(test_x, test_y, classes, "test")
    labels, ranked = torch.from_numpy(train_y.astype(np.int64)), []
    for seed in seeds:
        probe, rng = AttentiveProbe(train_x.shape[1] // TOKEN_GRID**2, classes, seed), np.random.default_rng(seed)
        optimiser = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
        for _ in range(EPOCHS):
            for rows, vectors in batches(train_x, BATCH, rng=rng):
                if len(rows) == 1:  # batch norm cannot tell one image's spread
                    continue
                loss = F.cross_entropy(probe(vectors), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            schedule.step()
        ranked.append(best_five(probe.eval(), test_x, 512))
    return scored(np.stack(ranked), test_y)


@torch.no_grad()
def class_texts(clip: Encoder, prompts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
    """`(K, C)` unit vectors: of every class the mean of its prompts' text embeddings."""
    tokenizer: Any = WordTokenizer()
    if clip.model.vocab_size != tokenizer.vocab_size:
        import open_clip  # takes seconds

        tokenizer = open_clip.get_tokenizer("ViT-B-32")
    texts = []
    for its in prompts:
        embedded = clip.model.encode_text(tokenizer(list(its)).to(clip.device), normalize=True)
        texts.append(F.normalize(embedded.float().mean(0), dim=0).cpu())
    return torch.stack(texts).numpy()


def zero_shot_probe(test_x: Features, test_y: Labels, texts: NDArray[np.float32]) -> ProbeResult:
    """The class whose `(K, C)` text of `class_texts` is nearest to CLIP's projected embeddings `(N, C)`: no labels."""
    test_x, names = checked(test_x, test_y, len(texts), "test"), torch.from_numpy(texts)
    return scored(best_five(lambda vectors: vectors @ names.T, test_x, 4096)[None], test_y)
