"""CLIP's own probe: the class whose prompts, as text, lie nearest to the image; no label is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from samantics.models.encoder import Encoder
from samantics.models.pocket import WordTokenizer
from samantics.probing.linear import Features, Labels, ProbeResult, batches, checked, scored


@torch.no_grad()
def class_texts(clip: Encoder, prompts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
    """`(K, C)` unit vectors: of every class the mean of its prompts' text embeddings."""
    tokenizer, texts = _tokenizer(clip), []
    for its in prompts:
        embedded = clip.model.encode_text(tokenizer(list(its)).to(clip.device), normalize=True)
        texts.append(normalize(embedded.float().mean(0), dim=0).cpu())
    return np.asarray(torch.stack(texts))


def _tokenizer(clip: Encoder) -> Callable[[list[str]], Tensor]:
    import open_clip  # takes seconds

    own = WordTokenizer()
    tokenizer: Any = own if clip.model.vocab_size == own.vocab_size else open_clip.get_tokenizer("ViT-B-32")
    return tokenizer


def zero_shot_probe(test_x: Features, test_y: Labels, texts: NDArray[np.float32]) -> ProbeResult:
    """The nearest text by cosine.

    Args:
        test_x: `(N, C)` CLIP's projected image embeddings.
        test_y: `(N,)` class labels from 0.
        texts: `(K, C)` of `class_texts`.
    """
    test_x = checked(test_x, test_y, len(texts), "test")
    ranked = np.empty((len(test_y), min(5, len(texts))), np.int64)
    for rows, vectors in batches(test_x, 4096):
        ranked[rows] = (vectors @ torch.from_numpy(texts).T).topk(ranked.shape[1]).indices.numpy()
    return scored(ranked, test_y)
