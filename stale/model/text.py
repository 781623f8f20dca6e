"""Language embedding: CLIP's text transformer and learned prompts turn class phrases into text features.

K classes, L tokens of the longest prompt, N context tokens, P tokens of a shared prefix, M packed tokens, W width of
the text transformer, C joint width.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stale.config import TextConfig
from stale.data.embeddings import EmbeddingTable
from stale.errors import StaleError
from stale.model import clip


@dataclass(frozen=True)
class Prompts:
    """K tokenized class phrases, packed as M rows: the P tokens that all begin with once, then the rests unpadded.

    No token depends on a later one, so that the first P have the same values in every prompt, and what follows the end
    token has no effect. A rest has at most R = L - P tokens, which attend to the prefix and those before.
    """

    tokens: Tensor  # (K, L) ids, padded to the longest; learned context tokens are not among them
    end: Tensor  # (K,) position of each end-of-text token in ``tokens``
    length: int  # P, at most the position of the first end token; with the learned context tokens
    rest: int  # R
    rows: Tensor  # (M - P,) the tokens of the K · R that are no padding
    last: Tensor  # (K,) each end token among these

    @classmethod
    def of(cls, tokens: Tensor, end: Tensor, shared: int | None = None) -> "Prompts":
        """Pack ``tokens`` (K, L), of which the first ``shared`` are the same in all; default: as many as possible."""
        if shared is None:
            shared = min(int((tokens == tokens[0]).all(0).cumprod(0).sum()), int(end.min()))
        rest = int(end.max()) + 1 - shared
        rows = (torch.arange(rest, device=end.device) <= end.unsqueeze(1) - shared).flatten().nonzero().squeeze(1)
        return cls(tokens, end, shared, rest, rows, (end + 1 - shared).cumsum(0) - 1)

    def to(self, device: torch.device) -> "Prompts":
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "end", "rows", "last")}
        return replace(self, **moved)

    def attend(self, qkv: Tensor, heads: int) -> Tensor:
        """Causal attention of packed queries, keys and values (M, 3 · W) → (M, W)."""
        P, R, K = self.length, self.rest, len(self.last)
        shared_query, shared_key, shared_value = _split_heads(qkv[None, :P], heads)  # each 1 × heads × P × W/heads
        prefix = F.scaled_dot_product_attention(shared_query, shared_key, shared_value, is_causal=True)

        padded = qkv.new_zeros(K * R, qkv.shape[1]).index_copy(0, self.rows, qkv[P:])  # K · R × 3 W
        query, key, value = _split_heads(padded.unflatten(0, (K, R)), heads)  # each K × heads × R × W/heads
        key = torch.cat([shared_key.expand(K, -1, -1, -1), key], 2)  # K × heads × P + R × W/heads
        value = torch.cat([shared_value.expand(K, -1, -1, -1), value], 2)
        visible = torch.ones(R, P + R, dtype=torch.bool, device=qkv.device).tril(P)
        rests = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        rests = _merge_heads(rests).flatten(0, 1).index_select(0, self.rows)  # M - P × W
        return torch.cat([_merge_heads(prefix)[0], rests])


class CausalAttention(nn.Module):
    """Multi-head self-attention to a token itself and those before it, with nn.MultiheadAttention's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, prompts: Prompts) -> Tensor:
        """Packed tokens (M, W) → (M, W)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(prompts.attend(qkv, self.heads))


def _split_heads(qkv: Tensor, heads: int) -> Tensor:
    """(K, L, 3 · W) → query, key and value (3, K, heads, L, W/heads)."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def _merge_heads(x: Tensor) -> Tensor:
    """(K, heads, L, W/heads) → (K, L, W)."""
    return x.transpose(1, 2).flatten(2)


class QuickGELU(nn.Module):
    """The approximation of GELU in OpenAI's models."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualBlock(nn.Module):
    """One pre-norm block of CLIP's text transformer."""

    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", activation), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, prompts: Prompts) -> Tensor:
        """Packed tokens (M, W) → (M, W)."""
        x = x + self.attn(self.ln_1(x), prompts)
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """CLIP's text transformer, with the state-dict names of OpenAI's checkpoints.

    The token embedding is not trained, so that the words of unseen names keep their position among the others. It is
    kept in the precision it was stored in, because it is most of the transformer's size.
    """

    token_embedding: Tensor

    def __init__(self, state: Mapping[str, Tensor], heads: int | None = None) -> None:
        """Build an empty transformer with the sizes of the state dict of another; ``heads`` as ``model.text.heads``."""
        super().__init__()
        num_tokens, width = state["token_embedding"].shape
        layers = len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")})
        heads = heads or (0 if width % 64 else width // 64)
        if not layers or not heads or width % heads:
            raise ValueError(
                f"{layers} layers, {width} wide, {heads} heads; set model.text.heads, which divide the width"
            )
        self.width, self.output_width = width, state["text_projection"].shape[1]
        self.context_length = state["positional_embedding"].shape[0]
        self.register_buffer("token_embedding", torch.empty_like(state["token_embedding"]))
        self.positional_embedding = nn.Parameter(torch.zeros(self.context_length, width))
        if "exact_gelu" in state:
            self.register_buffer("exact_gelu", torch.ones(()))  # a mark, which a checkpoint keeps
        activation = nn.GELU() if "exact_gelu" in state else QuickGELU()
        blocks = [ResidualBlock(width, heads=heads, activation=activation) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, self.output_width))

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], heads: int | None = None) -> "TextTransformer":
        """Build a transformer of what ``load_text_weights`` returns; a StaleError if it forms none."""
        state = dict(weights)
        state["token_embedding"] = state.pop("token_embedding.weight")
        try:
            transformer = cls(state, heads)
            transformer.load_state_dict(state)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise StaleError(f"text weights do not form CLIP's text transformer: {reason}") from None
        return transformer

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (K, L) → token embeddings (K, L, W)."""
        return F.embedding(tokens, self.token_embedding).to(self.positional_embedding.dtype)

    def forward(self, embedded: Tensor, prompts: Prompts) -> Tensor:
        """Token embeddings (K, L, W) → text features (K, C), those of the end tokens.

        L is that of the longest prompt: under the causal mask what follows an end token has no effect.
        """
        x = embedded + self.positional_embedding[: embedded.shape[1]]  # K × L × W
        rests = x[:, prompts.length : prompts.length + prompts.rest].flatten(0, 1)
        x = torch.cat([x[0, : prompts.length], rests.index_select(0, prompts.rows)])  # M × W
        for block in self.transformer["resblocks"].children():
            x = block(x, prompts)
        return self.ln_final(x[prompts.length :].index_select(0, prompts.last)) @ self.text_projection


class ClassEncoder(nn.Module):
    """Class phrases → text features (K, C). The vocabulary is no state: a checkpoint encodes any other classes."""

    output_width: int  # C

    @property
    def fixed(self) -> bool:
        """Whether nothing here is trained, so that a vocabulary needs encoding only once."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def tokenize(self, phrases: Sequence[str], template: str | None = None) -> Prompts:
        """Tokenize ``phrases`` on the CPU."""
        raise NotImplementedError

    def describe(self, groups: Sequence[Sequence[str]], template: str | None = None) -> Tensor:
        """Classes of several phrases each → (K, C): the mean of a class's phrases, each of unit length."""
        prompts = self.tokenize([phrase for group in groups for phrase in group], template)
        features = F.normalize(self(prompts.to(next(iter(self.state_dict().values())).device)), dim=-1)
        return torch.stack([part.mean(0) for part in features.split([len(group) for group in groups])])


class TextEncoder(ClassEncoder):
    """CLIP's text transformer on learned prompts or on a fixed template.

    * ``learned`` [P]: ``[SOT] p_1 … p_N  phrase . [EOT]``; p is trained in the space of token embeddings (CoOp).
    * ``template`` [C]: ``[SOT] a video of action phrase [EOT]``.
    """

    def __init__(self, transformer: TextTransformer, config: TextConfig) -> None:
        super().__init__()
        self.transformer = transformer.requires_grad_(config.encoder == "finetune")
        self.output_width = transformer.output_width
        self.template = "{}." if config.prompt == "learned" else config.template
        self.context: nn.Parameter | None = None
        if config.prompt == "learned":
            context = torch.randn(config.context_tokens, transformer.width) * 0.02  # CoOp's initialization
            if config.context_init:
                context = transformer.embed(torch.tensor(clip.encode(config.context_init))).float()
            self.context = nn.Parameter(context)  # N × W

    def tokenize(self, phrases: Sequence[str], template: str | None = None) -> Prompts:
        """Tokenize ``phrases`` on the CPU; ``template`` replaces the text around a phrase, not the context tokens."""
        if not phrases:
            raise StaleError("the vocabulary is empty: name at least one class")
        room = self.transformer.context_length - (0 if self.context is None else len(self.context))
        rows = [clip.tokenize((template or self.template).replace("{}", phrase)) for phrase in phrases]
        for phrase, row in zip(phrases, rows, strict=True):
            if len(row) > room:
                raise StaleError(f"class name '{phrase}' needs {len(row)} tokens; the text encoder has room for {room}")
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return Prompts.of(tokens, torch.tensor([len(row) - 1 for row in rows]))

    def forward(self, prompts: Prompts) -> Tensor:
        """Text features (K, C), not normalized."""
        embedded = self.transformer.embed(prompts.tokens)  # K × L × W
        if self.context is None:
            return self.transformer(embedded, prompts)
        N = len(self.context)
        context = self.context.expand(len(embedded), -1, -1)  # K × N × W
        embedded = torch.cat([embedded[:, :1], context, embedded[:, 1:]], dim=1)  # K × (N + L) × W
        return self.transformer(embedded, replace(prompts, length=prompts.length + N))


class ClassEmbeddings(ClassEncoder):
    """No text encoder (a row of the published ablation [P]): an embedding is learned for each seen class.

    It recognizes the seen classes by their tokenized names, which are a buffer of the checkpoint. Every other name gets
    the mean of the embeddings, so that it cannot tell unseen classes apart.
    """

    names: Tensor

    def __init__(self, names: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("names", names)
        self.embedding = nn.Parameter(torch.randn(len(names), width) * width**-0.5)
        self.output_width = width

    @staticmethod
    def names_of(phrases: Sequence[str]) -> Tensor:
        """Phrases as rows of token ids (K, L), padded with 0."""
        if not phrases:
            raise StaleError("the vocabulary is empty: name at least one class")
        return nn.utils.rnn.pad_sequence([torch.tensor(clip.encode(phrase)) for phrase in phrases], batch_first=True)

    def tokenize(self, phrases: Sequence[str], template: str | None = None) -> Prompts:
        """Tokenize ``phrases``; there is no prompt, so that ``template`` has no effect."""
        names = self.names_of(phrases)
        return Prompts.of(names, (names > 0).sum(1) - 1)

    def forward(self, prompts: Prompts) -> Tensor:
        """Embeddings (K, C): a seen class's own, any other's the mean."""
        length = max(prompts.tokens.shape[1], self.names.shape[1])
        asked, known = (F.pad(names, (0, length - names.shape[1])) for names in (prompts.tokens, self.names))
        same = (asked.unsqueeze(1) == known).all(2).to(self.embedding.dtype)  # K × seen classes
        unknown = same.sum(1, keepdim=True) == 0  # K × 1
        return torch.where(unknown, torch.full_like(same, 1 / len(known)), same) @ self.embedding


class FileEmbeddings(ClassEncoder):
    """Class embeddings of any vision-language model, from a file in place of a text encoder [ours].

    They are frozen; a linear ``adapter``, learned in place of prompts, adds a residual that starts at 0. The table is
    part of a checkpoint: a run detects the file's classes without the file, and others with a file that has them.
    """

    vectors: Tensor
    names: Tensor

    def __init__(self, table: EmbeddingTable, adapter: str = "none") -> None:
        super().__init__()
        self.register_buffer("vectors", torch.from_numpy(table.vectors))  # K × C
        self.register_buffer("names", torch.tensor([*json.dumps(table.names).encode()], dtype=torch.uint8))
        self.source, self.output_width = table.source, table.vectors.shape[1]
        self.adapter: nn.Linear | None = None
        if adapter == "linear":
            self.adapter = nn.Linear(self.output_width, self.output_width, bias=False)
            nn.init.zeros_(self.adapter.weight)

    @classmethod
    def replacing(cls, encoder: ClassEncoder, table: EmbeddingTable) -> "FileEmbeddings":
        """``table`` in place of a trained ``encoder``, whose adapter stays; a StaleError if that cannot be done."""
        if isinstance(encoder, FileEmbeddings):
            adapter = encoder.adapter
        elif encoder.fixed:
            adapter = None
        else:
            raise StaleError(
                f"{table.source}: the run has learned prompts or a trained text encoder, which embeddings of a file "
                "would bypass; name the classes without the file, or train with model.text.embeddings"
            )
        if table.vectors.shape[1] != encoder.output_width:
            width = f"{table.vectors.shape[1]} wide, but the run was trained with text {encoder.output_width} wide"
            raise StaleError(f"{table.source} are {width}: embed the classes by the same model")
        replaced = cls(table).to(next(iter(encoder.state_dict().values())).device)
        replaced.adapter = adapter
        return replaced

    def table(self) -> EmbeddingTable:
        """The named embeddings, as the buffers hold them; a ValueError if their names are damaged."""
        names = json.loads(bytes(self.names.tolist()))
        return EmbeddingTable(names, self.vectors.cpu().numpy(), self.source)

    def tokenize(self, phrases: Sequence[str], template: str | None = None) -> Prompts:
        """The rows of ``phrases`` in the table; without a text encoder, a ``template`` is a StaleError."""
        if not phrases or template is not None:
            fault = "the vocabulary is empty" if not phrases else "templates need a text encoder; leave them out"
            raise StaleError(f"{self.source}: {fault}")
        rows = torch.tensor(self.table().find(phrases))
        return Prompts.of(rows.unsqueeze(1), torch.zeros_like(rows))

    def forward(self, prompts: Prompts) -> Tensor:
        """Embeddings (K, C)."""
        vectors = self.vectors[prompts.tokens[:, 0]]
        return vectors if self.adapter is None else vectors + self.adapter(vectors)
