"""Language embedding (section 2): CLIP's text transformer, its weights, and learnable prompts.

K classes, L tokens of the longest prompt, N context tokens, W width of the tower, C joint embedding width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stale.errors import StaleError
from stale.model import tokenizer
from stale.model.weights import read_clip_weights


@dataclass(frozen=True)
class Prompts:
    """Tokenised class phrases, padded to the longest.

    Attributes:
        tokens: (K, L) ids; where prompts are learned, the context tokens are not among them.
        end: (K,) position of each end-of-text token in ``tokens``.
    """

    tokens: Tensor
    end: Tensor

    def to(self, device: torch.device) -> Prompts:
        """The same prompts on ``device``."""
        return Prompts(self.tokens.to(device), self.end.to(device))


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CausalAttention(nn.Module):
    """Multi-head self-attention under a causal mask, with nn.MultiheadAttention's parameter names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, shared: int, length: int) -> Tensor:
        """Tokens (``shared`` + K · ``length``, W): those that all K prompts begin with, then the rest of each."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = self._heads(qkv[shared:], length)  # each K × heads × length × W/heads
        if not shared:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            return self.out_proj(out.transpose(1, 2).flatten(2).flatten(0, 1))
        first = self._heads(qkv[:shared], shared)
        begin = F.scaled_dot_product_attention(*first, is_causal=True)
        key, value = (
            torch.cat([its.expand(len(x), -1, -1, -1), x], 2) for its, x in zip(first[1:], (key, value), strict=True)
        )
        seen = torch.ones(length, shared + length, dtype=torch.bool, device=x.device).tril(shared)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.out_proj(torch.cat([part.transpose(1, 2).flatten(2).flatten(0, 1) for part in (begin, out)]))

    def _heads(self, qkv: Tensor, length: int) -> Tensor:
        """(K · length, 3 · W) → (3, K, heads, length, W/heads)."""
        return qkv.view(-1, length, 3, self.heads, qkv.shape[1] // (3 * self.heads)).permute(2, 0, 3, 1, 4)


class ResidualBlock(nn.Module):
    """One pre-norm block of CLIP's text transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, shared: int, length: int) -> Tensor:
        """As :meth:`CausalAttention.forward`."""
        x = x + self.attn(self.ln_1(x), shared, length)
        return x + self.mlp(self.ln_2(x))


class TextTower(nn.Module):
    """CLIP's text transformer, with the state-dict names of OpenAI's checkpoints.

    The token embedding is kept fixed, so that the words of unseen names keep their place among the others,
    and in the precision it was stored in: it is most of the tower's size.
    """

    def __init__(self, width: int, layers: int, output_width: int, context_length: int, num_tokens: int) -> None:
        super().__init__()
        self.width, self.output_width, self.context_length = width, output_width, context_length
        self.register_buffer("token_embedding", torch.zeros(num_tokens, width))
        self.positional_embedding = nn.Parameter(torch.zeros(context_length, width))
        blocks = [ResidualBlock(width, heads=width // 64) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, output_width))

    @classmethod
    def like(cls, shapes: Mapping[str, Sequence[int]]) -> TextTower:
        """A tower of zeros with the sizes that ``shapes`` (name in its state dict → shape) implies."""
        num_tokens, width = shapes["token_embedding"]
        layers = len({name.split(".")[2] for name in shapes if name.startswith("transformer.resblocks.")})
        context_length, output_width = shapes["positional_embedding"][0], shapes["text_projection"][1]
        if not layers or not width or width % 64:
            raise ValueError(f"{layers} layers, {width} wide; CLIP has at least one and a multiple of 64")
        return cls(width, layers, output_width, context_length, num_tokens)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> TextTower:
        """A tower with ``weights`` as :func:`load_text_weights` gives them.

        Raises:
            StaleError: the tensors do not form CLIP's text transformer.
        """
        state = dict(weights)
        state["token_embedding"] = state.pop("token_embedding.weight")
        try:
            tower = cls.like({name: tuple(tensor.shape) for name, tensor in state.items()})
            tower.token_embedding = torch.empty_like(state["token_embedding"])  # keeps the stored precision
            tower.load_state_dict(state)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise StaleError(f"text weights do not form CLIP's text transformer: {reason}") from None
        return tower

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (K, L) → token embeddings (K, L, W)."""
        return F.embedding(tokens, self.token_embedding).to(self.positional_embedding.dtype)

    def forward(self, embedded: Tensor, end: Tensor, shared: int = 0) -> Tensor:
        """Token embeddings (K, L, W), L at most the context length → text features (K, C), read at ``end`` (K,).

        Under the causal mask what follows the end token cannot matter, so L is only as long as it must be, and no
        token knows of those after it, so what all prompts begin with is computed once.

        Args:
            shared: so many tokens at the begin are the same in all prompts; less than any of ``end``.
        """
        K, L, _ = embedded.shape
        x = embedded + self.positional_embedding[:L]
        x = torch.cat([x[0, :shared], x[:, shared:].flatten(0, 1)])  # shared + K · (L - shared) tokens
        for block in self.transformer["resblocks"]:
            x = block(x, shared, L - shared)
        last = shared + torch.arange(K, device=x.device) * (L - shared) + end - shared
        return self.ln_final(x[last]) @ self.text_projection


class TextEncoder(nn.Module):
    """Class phrases → text features (K, C), by learned prompts or a fixed template (section 2).

    The vocabulary is an argument, not state: a checkpoint trained on seen names works with any other names.
    """

    def __init__(
        self,
        tower: TextTower,
        prompt: str = "learned",
        num_context_tokens: int = 16,
        context_init: str | None = None,
        template: str = "a video of action {}",
        finetune: bool = True,
    ) -> None:
        """Args:
        prompt: ``learned`` (CoOp's context tokens, the paper) or ``template`` (fixed text, released code).
        num_context_tokens: N, not published; random at the start, as CoOp's. Ignored with a template.
        context_init: words that the context tokens start as (their number replaces N), CoOp's other way.
        template: fixed prompt with ``{}`` for the phrase.
        finetune: train the tower too (the paper's main model) or keep it frozen.
        """
        super().__init__()
        self.tower = tower.requires_grad_(finetune)
        self.template = "{}." if prompt == "learned" else template
        self.context = None
        if prompt == "learned":
            context = torch.randn(num_context_tokens, tower.width) * 0.02  # CoOp's initialisation
            if context_init:
                context = tower.embed(torch.tensor(tokenizer.encode(context_init))).float()
            self.context = nn.Parameter(context)

    @property
    def output_width(self) -> int:
        """C."""
        return self.tower.output_width

    @property
    def fixed(self) -> bool:
        """Whether nothing here is trained, so that a vocabulary needs encoding only once."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def tokenize(self, phrases: Sequence[str], template: str | None = None) -> Prompts:
        """Tokenise ``phrases`` on the CPU, as long as the longest needs.

        Args:
            template: in place of the encoder's own text around a phrase; context tokens stay before it.

        Raises:
            StaleError: no phrase, or one that does not fit the tower's context.
        """
        if not phrases:
            raise StaleError("the vocabulary is empty: name at least one class")
        room = self.tower.context_length - (0 if self.context is None else len(self.context))
        rows = []
        for phrase in phrases:
            text = (template or self.template).replace("{}", phrase)
            row = [tokenizer.start_token(), *tokenizer.encode(text), tokenizer.end_token()]
            if len(row) > room:
                raise StaleError(f"class name '{phrase}' needs {len(row)} tokens; the text tower has room for {room}")
            rows.append(row)
        end = torch.tensor([len(row) - 1 for row in rows])
        tokens = torch.zeros(len(rows), int(end.max()) + 1, dtype=torch.long)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row)
        return Prompts(tokens, end)

    def forward(self, prompts: Prompts) -> Tensor:
        """Text features (K, C), not normalised."""
        embedded, end = self.tower.embed(prompts.tokens), prompts.end  # K × L × W
        if self.context is None:
            return self.tower(embedded, end)
        context = self.context.expand(len(embedded), -1, -1)
        embedded = torch.cat([embedded[:, :1], context, embedded[:, 1:]], dim=1)  # K × (N + L) × W
        return self.tower(embedded, end + len(self.context), shared=1 + len(self.context))

    def describe(self, groups: Sequence[Sequence[str]], template: str | None = None) -> Tensor:
        """Classes of several phrases each → (K, C): the mean of a class's phrases, each of unit length."""
        prompts = self.tokenize([phrase for group in groups for phrase in group], template)
        features = F.normalize(self(prompts.to(self.tower.text_projection.device)), dim=-1)
        return torch.stack([part.mean(0) for part in features.split([len(group) for group in groups])])


class ClassEmbeddings(nn.Module):
    """No text encoder (a row of the published ablation): an embedding is learned for each seen class.

    It knows its classes by their tokenised names and has nothing to tell others by: every other name gets the mean
    of the embeddings, so that unseen classes are all alike to it. Its names are a buffer of the checkpoint.
    """

    fixed = False  # as TextEncoder.fixed

    def __init__(self, names: Tensor, width: int) -> None:
        """Args:
        names: (K, L) of :meth:`names_of` the seen classes.
        width: C.
        """
        super().__init__()
        self.register_buffer("names", names)
        self.embedding = nn.Parameter(torch.randn(len(names), width) * width**-0.5)
        self.output_width = width

    @staticmethod
    def names_of(phrases: Sequence[str]) -> Tensor:
        """Phrases as rows of token ids (K, L), padded with 0.

        Raises:
            StaleError: no phrase.
        """
        rows = [torch.tensor(tokenizer.encode(phrase)) for phrase in phrases]
        if not rows:
            raise StaleError("the vocabulary is empty: name at least one class")
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def tokenize(self, phrases: Sequence[str], template: str | None = None) -> Prompts:
        """Tokenise ``phrases``; there is no prompt, so a ``template`` changes nothing."""
        names = self.names_of(phrases)
        return Prompts(names, (names > 0).sum(1))

    def forward(self, prompts: Prompts) -> Tensor:
        """Embeddings (K, C): a seen class's own, any other's the mean."""
        length = max(prompts.tokens.shape[1], self.names.shape[1])
        asked, known = (F.pad(names, (0, length - names.shape[1])) for names in (prompts.tokens, self.names))
        same = (asked.unsqueeze(1) == known).all(2).to(self.embedding.dtype)  # K asked × K seen
        unknown = same.sum(1, keepdim=True) == 0
        return torch.where(unknown, torch.full_like(same, 1 / len(known)), same) @ self.embedding

    def describe(self, groups: Sequence[Sequence[str]], template: str | None = None) -> Tensor:
        """As :meth:`TextEncoder.describe`."""
        prompts = self.tokenize([phrase for group in groups for phrase in group])
        features = F.normalize(self(prompts.to(self.embedding.device)), dim=-1)
        return torch.stack([part.mean(0) for part in features.split([len(group) for group in groups])])


def load_text_weights(source: str | Path) -> dict[str, Tensor]:
    """The text half of CLIP weights: a file (OpenAI's TorchScript archive or a state dict) or a model's name.

    A name such as ``ViT-B/16`` is downloaded by openai-clip with its checksum, which needs torchvision.

    Returns:
        OpenAI's state-dict names → tensors; the token embedding as stored, everything else in float32.

    Raises:
        StaleError: no such file or model, or no text transformer in it.
    """
    state = read_clip_weights(source, "text weights")
    keep = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    weights = {name: tensor for name, tensor in state.items() if name.startswith(keep)}
    for required in ("token_embedding.weight", "positional_embedding", "text_projection"):
        if required not in weights:
            raise StaleError(f"text weights {source}: no '{required}'; OpenAI's CLIP state-dict names are expected")
    return {name: t if name == "token_embedding.weight" else t.float() for name, t in weights.items()}
