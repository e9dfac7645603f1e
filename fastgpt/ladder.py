"""The lecture "Let's build GPT: from scratch, in code, spelled out" as running code, to be read from the top.

Each rung is a few lines over the one before it and predicts the next character of tiny Shakespeare a little
better; `fastgpt ladder` lists them, trains them, and prints their losses beside the lecture's. Names are the
lecture's, operations are PyTorch's own. `fastgpt.model` is the network that all this leads to, and the last
lines here say in what it differs.

Shapes: B sequences of T characters (batch_size, block_size), C channels (n_embd), H heads of D = C / H
channels, V characters in the vocabulary. Losses are in nats a character.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from fastgpt.data import TokenDataset
from fastgpt.errors import InputError

MAX_VOCAB = 4096  # the bigram has a table of V x V


@dataclass(frozen=True)
class Settings:
    """How large a rung's network is and how it is trained. The defaults are the lecture's small network."""

    block_size: int = 8
    batch_size: int = 32
    n_embd: int = 32
    n_head: int = 4
    n_layer: int = 3
    dropout: float = 0.0
    learning_rate: float = 1e-3
    steps: int = 5000


# -- text as numbers -----------------------------------------------------------------------------------------

Splits = dict[str, Tensor]


def splits(data: TokenDataset, block_size: int) -> Splits:
    """The whole text as character ids, int64: 90% of it under "train", the rest under "val".

    Raises:
        InputError: a split without a window of block_size + 1, too many characters, an id that is none.
    """
    vocab_size = data.tokenizer.vocab_size
    if vocab_size > MAX_VOCAB:
        raise InputError(
            f"a vocabulary of {vocab_size}, and the bigram has a table of its square: the ladder is for "
            f"characters, {MAX_VOCAB} at most; use a text file, or shards of the char or byte tokenizer"
        )
    found = {}
    for name, shards in {"train": data.train, "val": data.val}.items():
        tokens = torch.from_numpy(np.concatenate(shards).astype(np.int64))
        if len(tokens) <= block_size:
            raise InputError(
                f"the {name} split has {len(tokens)} characters, fewer than a window of block_size + 1 = "
                f"{block_size + 1}: use more text"
            )
        if tokens.max() >= vocab_size:
            raise InputError(
                f"{data.names[name][0]}: token {tokens.max()} is outside the vocabulary of {vocab_size}: "
                "the file is corrupt or was made with another tokenizer"
            )
        found[name] = tokens
    return found


def get_batch(tokens: Tensor, settings: Settings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows from random places of the text, (B, T), and the character after each of theirs, (B, T)."""
    B, T = settings.batch_size, settings.block_size
    starts = torch.randint(len(tokens) - T, (B, 1))
    windows = tokens[starts + torch.arange(T + 1)].to(device)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# -- training, and how well it went --------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """What all rungs share: the loss, and writing text. A rung says how ids become logits."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.block_size = settings.block_size

    def logits(self, idx: Tensor) -> Tensor:
        """(B, T, V) of the character after each of idx (B, T), T <= block_size."""
        raise NotImplementedError

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) and, given targets (B, T), the mean cross entropy."""
        logits = self.logits(idx)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        """idx (B, T), T >= 1, and after it max_new_tokens more, each drawn by the model's probabilities."""
        self.eval()
        for _ in range(max_new_tokens):
            logits = self.logits(idx[:, -self.block_size :])[:, -1]  # (B, V), after the last character
            following = torch.multinomial(logits.softmax(-1), num_samples=1)  # (B, 1)
            idx = torch.cat([idx, following], dim=1)
        return idx


def train(model: LanguageModel, tokens: Tensor, settings: Settings, device: torch.device) -> None:
    """Train the model in place, on random batches."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    for _ in trange(settings.steps, unit="step", leave=False, disable=None):
        _, loss = model(*get_batch(tokens, settings, device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def estimate_loss(
    model: LanguageModel, tokens: Tensor, settings: Settings, device: torch.device, batches: int = 200
) -> float:
    """The mean loss over random batches, without dropout."""
    model.eval()
    losses = [model(*get_batch(tokens, settings, device))[1] for _ in range(batches)]
    return torch.stack(losses).mean().item()


# -- rung 1: bigram ------------------------------------------------------------------------------------------


class Bigram(LanguageModel):
    """Only the last character counts: its row of a table holds the logits of the next."""

    def __init__(self, vocab_size: int, settings: Settings) -> None:
        super().__init__(settings)
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        return self.token_embedding_table(idx)  # (B, T, V)


# -- rung 2: averaging, the weakest way to look at more than one character -----------------------------------


def average_by_loops(x: Tensor) -> Tensor:
    """For each place the mean of x, (B, T, C), over this place and those before it: (B, T, C)."""
    B, T, _ = x.shape
    out = torch.empty_like(x)
    for b in range(B):
        for t in range(T):
            out[b, t] = x[b, : t + 1].mean(0)
    return out


def average_by_matrix_product(x: Tensor) -> Tensor:
    """The same as one product: row t of the weights is 1 / (t + 1) up to place t, and then 0."""
    T = x.size(1)
    wei = x.new_ones(T, T).tril()
    wei = wei / wei.sum(1, keepdim=True)  # (T, T)
    return wei @ x  # (T, T) @ (B, T, C) -> (B, T, C)


def average_by_softmax(x: Tensor) -> Tensor:
    """The same again: scores of 0 for the past and -inf for the future become equal weights and none.

    This is self-attention already, but for the scores: there they will be learned, and depend on x.
    """
    T = x.size(1)
    scores = x.new_zeros(T, T)
    wei = causal_softmax(scores)  # (T, T)
    return wei @ x


def causal_softmax(scores: Tensor) -> Tensor:
    """Weights (..., T, T) from scores (..., T, T): each row sums to 1, and gives nothing to the future."""
    T = scores.size(-1)
    past = torch.ones(T, T, dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~past, -torch.inf).softmax(-1)


# -- rung 3: self-attention ----------------------------------------------------------------------------------


class Head(nn.Module):
    """One head of self-attention: a weighted average of the past, whose weights are found by content.

    Each place says what it looks for (query), what it has (key), and what it gives to those that find it
    (value). A score is query · key; 1 / sqrt(D) keeps its variance at 1, and softmax from choosing one place.
    """

    def __init__(self, settings: Settings, head_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(settings.n_embd, head_size, bias=False)
        self.key = nn.Linear(settings.n_embd, head_size, bias=False)
        self.value = nn.Linear(settings.n_embd, head_size, bias=False)
        self.dropout = nn.Dropout(settings.dropout)  # 0, until the network is scaled up

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, D) each
        wei = causal_softmax(q @ k.transpose(-2, -1) * q.size(-1) ** -0.5)  # (B, T, T)
        return self.dropout(wei) @ v  # (B, T, D)


class Transformer(LanguageModel):
    """Characters and their positions as vectors, a body that works on them, and logits from what it gives.

    From here on the rungs differ only in the body, a module from (B, T, C) to (B, T, C).
    """

    def __init__(self, vocab_size: int, settings: Settings, body: nn.Module) -> None:
        super().__init__(settings)
        self.token_embedding_table = nn.Embedding(vocab_size, settings.n_embd)
        self.position_embedding_table = nn.Embedding(settings.block_size, settings.n_embd)
        self.body = body
        self.lm_head = nn.Linear(settings.n_embd, vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        positions = torch.arange(idx.size(1), device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(positions)  # (B, T, C)
        return self.lm_head(self.body(x))  # (B, T, V)


def attention(vocab_size: int, settings: Settings) -> Transformer:
    return Transformer(vocab_size, settings, Head(settings, settings.n_embd))


# -- rung 4: several heads -----------------------------------------------------------------------------------


class MultiHeadAttention(nn.Module):
    """H smaller heads beside one another: each may look for something else."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        head_size = settings.n_embd // settings.n_head
        self.heads = nn.ModuleList(Head(settings, head_size) for _ in range(settings.n_head))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=-1)  # (B, T, H * D) = (B, T, C)


def multi_head(vocab_size: int, settings: Settings) -> Transformer:
    return Transformer(vocab_size, settings, MultiHeadAttention(settings))


# -- rung 5: feed-forward ------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """After the places have communicated, each thinks on its own about what it was told."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(settings.n_embd, settings.n_embd), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, T, C)


class Block(nn.Module):
    """Communication, then computation."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.sa: nn.Module = MultiHeadAttention(settings)
        self.ffwd: nn.Module = FeedForward(settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffwd(self.sa(x))


def feed_forward(vocab_size: int, settings: Settings) -> Transformer:
    return Transformer(vocab_size, settings, Block(settings))


# -- rung 6: blocks, deep enough to be hard to optimise ------------------------------------------------------


def blocks(vocab_size: int, settings: Settings) -> Transformer:
    body = nn.Sequential(*(Block(settings) for _ in range(settings.n_layer)))
    return Transformer(vocab_size, settings, body)


# -- rung 7: residual connections ----------------------------------------------------------------------------


class ProjectedHeads(MultiHeadAttention):
    """A linear layer mixes what the heads found, on its way back into the residual stream."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.proj = nn.Linear(settings.n_embd, settings.n_embd)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(super().forward(x)))  # (B, T, C)


class WideFeedForward(FeedForward):
    """Four times as wide inside, as in "Attention is all you need", and with a projection back."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        C = settings.n_embd
        self.net = nn.Sequential(
            nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C), nn.Dropout(settings.dropout)
        )


class ResidualBlock(Block):
    """Each part adds to x instead of replacing it: gradients reach every block through the additions."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.sa, self.ffwd = ProjectedHeads(settings), WideFeedForward(settings)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(x)
        return x + self.ffwd(x)


def residual(vocab_size: int, settings: Settings) -> Transformer:
    body = nn.Sequential(*(ResidualBlock(settings) for _ in range(settings.n_layer)))
    return Transformer(vocab_size, settings, body)


# -- rung 8: LayerNorm ---------------------------------------------------------------------------------------


class PreNormBlock(ResidualBlock):
    """What a part reads has mean 0 and variance 1 at each place. The residual stream itself stays free."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.ln1, self.ln2 = nn.LayerNorm(settings.n_embd), nn.LayerNorm(settings.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


def layer_norm(vocab_size: int, settings: Settings) -> Transformer:
    blocks = (PreNormBlock(settings) for _ in range(settings.n_layer))
    body = nn.Sequential(*blocks, nn.LayerNorm(settings.n_embd))
    return Transformer(vocab_size, settings, body)


# -- rung 9: scaled up, with dropout -------------------------------------------------------------------------

# The network is that of rung 8. The lecture's size is for a GPU: 5000 steps of 1.2e12 operations. The reduced
# one is for a CPU; so small a network overfits little in so few steps, and needs less dropout.
LECTURE = Settings(
    block_size=256,
    batch_size=64,
    n_embd=384,
    n_head=6,
    n_layer=6,
    dropout=0.2,
    learning_rate=3e-4,
    steps=5000,
)
REDUCED = Settings(
    block_size=64, batch_size=16, n_embd=128, n_head=4, n_layer=4, dropout=0.1, learning_rate=2e-3, steps=2000
)


# -- the lecture's exercise EX1: the heads as one tensor -----------------------------------------------------


class BatchedHeads(nn.Module):
    """ProjectedHeads without its loop: heads are one more dimension, which products treat as they do B.

    H times fewer calls, and the queries, keys and values of all heads come from one matrix product.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.n_head = settings.n_head
        self.qkv = nn.Linear(settings.n_embd, 3 * settings.n_embd, bias=False)
        self.attn_dropout = nn.Dropout(settings.dropout)
        self.proj = nn.Linear(settings.n_embd, settings.n_embd)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        wei = causal_softmax(q @ k.transpose(-2, -1) * q.size(-1) ** -0.5)  # (B, H, T, T)
        out = (self.attn_dropout(wei) @ v).transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.dropout(self.proj(out))

    @torch.no_grad()
    def copy_from(self, separate: ProjectedHeads) -> None:
        """Take over the weights of separate heads."""
        self.qkv.weight.copy_(torch.cat(qkv_weights(separate)))
        self.proj.load_state_dict(separate.proj.state_dict())


def qkv_weights(separate: MultiHeadAttention) -> list[Tensor]:
    """3H weights (D, C): every head's query, then every key, then every value, as in BatchedHeads.qkv."""
    return [getattr(head, name).weight for name in ("query", "key", "value") for head in separate.heads]


# -- the ladder ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """One step of the lecture: what it adds, its network (none where two ways of computing are compared).

    `lecture` is the validation loss that the lecture reports, where it reports one.
    """

    adds: str
    model: Callable[[int, Settings], LanguageModel] | None
    settings: Settings = Settings()
    lecture: float | None = None


RUNGS = {
    "bigram": Rung(
        "the next character from the last one alone", Bigram, Settings(learning_rate=1e-2, steps=3000), 2.5
    ),
    "averaging": Rung("the mean of the past: by loops, by a matrix product, by softmax", None),
    "attention": Rung("a head of self-attention: a mean weighted by content", attention, lecture=2.4),
    "multi-head": Rung("four smaller heads instead of one", multi_head, lecture=2.28),
    "feed-forward": Rung("computation at each place, after communication", feed_forward, lecture=2.24),
    "blocks": Rung("three of these one after another: deep, and hard to optimise", blocks),
    "residual": Rung("residual connections, projections, a wider feed-forward", residual, lecture=2.08),
    "layer-norm": Rung("LayerNorm before each part and at the end", layer_norm, lecture=2.06),
    "scaled": Rung("a larger network with dropout", layer_norm, LECTURE, lecture=1.48),
    "batched-heads": Rung("exercise EX1: all heads as one tensor", None, LECTURE),
}

# How fastgpt.model.GPT differs from the last rung that is trained:
# - its heads are batched as in EX1, and q, k and v have biases, as GPT-2's have;
# - GPT-2's activation is GELU (GPTConfig(activation="relu") gives this one);
# - the classifier is the token embedding itself, without a bias (tied_head), and rows are added to the
#   vocabulary, so that its size is a multiple of 128; dropout follows the embeddings too;
# - weights start from normal(0, 0.02), smaller where they lead into the residual stream, which sums n_layer
#   times two parts (_init_weights), and not from PyTorch's defaults;
# - attention, LayerNorm with the residual addition before it, GELU and the loss are operations of
#   `fastgpt.ops`, which have kernels.
# With the same weights, and those choices undone, both compute the same: tests/test_ladder.py shows it.
