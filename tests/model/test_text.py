"""The text transformer is CLIP's, prompts are CoOp's, and neither depends on a vocabulary."""

import copy
import math
import warnings
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stale.config import TextConfig
from stale.errors import StaleError
from stale.model import clip
from stale.model.clip import load_clip_module, load_text_weights
from stale.model.text import Prompts, TextEncoder, TextTransformer
from tests.helpers import random_text_encoder_weights, tiny_text_transformer

PHRASES = ["diving", "clean and jerk", "throwing a frisbee very far", "Hammer throw"]


def openai_clip(width: int, layers: int, output_width: int, heads: int | None = None) -> nn.Module:
    """openai-clip's own model with random weights, none of them at a neutral value."""
    torch.manual_seed(0)
    vision = {"image_resolution": 32, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 32}
    text = {"transformer_width": width, "transformer_heads": heads or width // 64, "transformer_layers": layers}
    model = load_clip_module("model").CLIP(output_width, **vision, context_length=77, vocab_size=49408, **text)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def small_clip() -> nn.Module:
    return openai_clip(width=128, layers=2, output_width=32)


def encoder_like(model: nn.Module, heads: int | None = None, **options: object) -> TextEncoder:
    return TextEncoder(TextTransformer.from_weights(text_half(model), heads), TextConfig(**options))


def text_half(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`load_text_weights` would give of ``model``."""
    others = ("visual.", "logit_scale")
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(others)}


def padded_tokens(texts: list[str]) -> Tensor:
    """What ``clip.tokenize`` gives: (K, 77)."""
    tokens = torch.zeros(len(texts), 77, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        ids = clip.tokenize(text)
        row[: len(ids)] = torch.tensor(ids)
    return tokens


@torch.no_grad()
def coop_reference(model: nn.Module, context: Tensor, phrase: str) -> Tensor:
    """[SOT] context name . [EOT], padded to 77, through openai-clip's modules."""
    N = len(context)
    start, *name = clip.tokenize(f"{phrase}.")
    ids = [start, *[0] * N, *name]
    x = model.token_embedding(torch.tensor(ids + [0] * (77 - len(ids))))
    x[1 : 1 + N] = context
    x = model.transformer((x + model.positional_embedding).unsqueeze(1)).squeeze(1)
    return model.ln_final(x)[len(ids) - 1] @ model.text_projection


@pytest.mark.parametrize(("width", "layers", "heads"), [(64, 1, None), (128, 3, None), (192, 2, None), (96, 2, 4)])
@pytest.mark.parametrize("template", ["a video of action {}", "{}"])
@torch.no_grad()
def test_fixed_prompts_equal_encode_text(width: int, layers: int, heads: int | None, template: str) -> None:
    model = openai_clip(width, layers, 96, heads)
    encoder = encoder_like(model, heads, prompt="template", template=template)
    expected = model.encode_text(padded_tokens([template.format(phrase) for phrase in PHRASES]))
    prompts = encoder.tokenize(PHRASES)
    assert prompts.tokens.shape[1] < 20, "no more tokens than the longest prompt has"
    assert expected.std() > 0.1
    torch.testing.assert_close(encoder(prompts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_context_tokens", [1, 5, 16])
@torch.no_grad()
def test_learned_prompts_equal_the_slow_padded_way(small_clip: nn.Module, num_context_tokens: int) -> None:
    encoder = encoder_like(small_clip, context_tokens=num_context_tokens)
    encoder.context.normal_()
    expected = torch.stack([coop_reference(small_clip, encoder.context, phrase) for phrase in PHRASES])
    torch.testing.assert_close(encoder(encoder.tokenize(PHRASES)), expected, atol=1e-5, rtol=1e-5)


def test_packed_prompts_equal_each_prompt_alone() -> None:
    """Features and gradients, whatever share of what all prompts begin with is computed once."""
    transformer, generator = tiny_text_transformer(), torch.Generator().manual_seed(0)
    embedded = torch.randn(3, 9, transformer.width, generator=generator)
    embedded[:, :5] = embedded[0, :5]
    tokens, end = torch.zeros(3, 9, dtype=torch.long), torch.tensor([5, 8, 7])

    def run(x: Tensor, packed: list[Prompts]) -> tuple[Tensor, Tensor]:
        context = x.clone().requires_grad_()
        parts = torch.cat([context[:1, :5].expand(3, -1, -1), context[:, 5:]], 1).split(3 // len(packed))
        features = torch.cat([transformer(part, one) for part, one in zip(parts, packed, strict=True)])
        features.sum().backward()
        return features, context.grad

    alone = run(embedded, [Prompts.of(tokens[:1], one, 0) for one in end.split(1)])
    assert alone[1][0, 6:].abs().max() == 0, "what follows an end token has no effect"
    for shared in range(6):
        prompts = Prompts.of(tokens, end, shared)
        assert len(prompts.rows) == (end + 1 - shared).sum()
        for found, expected in zip(run(embedded, [prompts]), alone, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["learned", "template"])
def test_only_what_differs_between_prompts_is_computed_for_each(prompt: str) -> None:
    encoder = TextEncoder(tiny_text_transformer(), TextConfig(prompt=prompt))
    prompts = encoder.tokenize(PHRASES)
    length, after = (1, 2) if prompt == "learned" else (5, 1)  # [SOT] … . [EOT], [SOT] a video of action … [EOT]
    assert prompts.length == length
    assert len(prompts.rows) == sum(len(clip.encode(phrase)) + after for phrase in PHRASES)
    some = torch.tensor([3, 1])  # with padding that none of them needs
    features = encoder(Prompts.of(prompts.tokens[some], prompts.end[some]))
    torch.testing.assert_close(features, encoder(prompts)[some], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("prompt", "room"), [("learned", 77 - 2 - 16 - 1), ("template", 77 - 2 - 4)])
def test_a_name_too_long_is_an_error_and_one_that_just_fits_is_not(prompt: str, room: int) -> None:
    encoder = TextEncoder(tiny_text_transformer(), TextConfig(prompt=prompt))
    longest = " ".join(["dive"] * room)
    with torch.no_grad():
        assert encoder(encoder.tokenize([longest])).isfinite().all()
    with pytest.raises(StaleError, match="dive dive.* needs .* tokens"):
        encoder.tokenize(["diving", f"{longest} dive"])


# Weights


class Arbitrary:
    """Not a tensor."""


WITHOUT = {
    name: {key: tensor for key, tensor in random_text_encoder_weights(num_tokens=8).items() if key != name}
    for name in ("token_embedding.weight", "positional_embedding", "text_projection")
}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        *((content, r"weights\.pt") for content in (b"", b"no weights at all", b"PK\x03\x04 a broken archive")),
        *((content, r"weights\.pt") for content in ({"model": {}}, [torch.zeros(1)], {"epoch": 3}, Arbitrary(), {})),
        *((content, name) for name, content in WITHOUT.items()),
        (random_text_encoder_weights(num_tokens=8), "know 8 tokens, CLIP's tokenizer has 49408"),
        ({**random_text_encoder_weights(), "ln_final.bias": torch.full((64,), math.inf)}, "infinite .* ln_final.bias"),
    ],
)
def test_a_file_without_text_weights_is_an_error(tmp_path: Path, content: object, named: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "weights.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(StaleError, match=named):
        load_text_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"transformer.resblocks.1.ln_1.weight": None},
        *({"ln_final.bias": torch.zeros(63)}, {"transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(64, 256)}),
        *({name: torch.zeros(64)} for name in ("text_projection", "token_embedding.weight")),
    ],
    ids=lambda change: " ".join(change),
)
def test_tensors_that_form_no_text_transformer_are_an_error(change: dict[str, Tensor | None]) -> None:
    changed = {**random_text_encoder_weights(num_tokens=8), "logit_scale": None, **change}
    weights = {name: tensor for name, tensor in changed.items() if tensor is not None}
    with pytest.raises(StaleError, match="text transformer") as error:
        TextTransformer.from_weights(weights)
    with pytest.raises(StaleError, match="64 wide, 5 heads; set model.text.heads"):
        TextTransformer.from_weights(random_text_encoder_weights(num_tokens=8), heads=5)
    assert "\n" not in str(error.value)


# Weights by name


def archive(path: Path, model: nn.Module) -> Path:
    """A TorchScript archive, as OpenAI publishes its models."""
    example = (torch.zeros(1, 3, 32, 32), padded_tokens(["diving"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates making such archives
        torch.jit.trace(model, example, check_trace=False).save(path)
    return path


@pytest.fixture
def published(tmp_path: Path, small_clip: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A known archive that was downloaded before; nothing else can be."""
    (tmp_path / "cache").mkdir()
    path = archive(tmp_path / "cache" / "ViT-B-16.pt", small_clip)
    monkeypatch.setattr(clip, "ADDRESS", "http://127.0.0.1:9/{file}")
    monkeypatch.setattr(clip, "CACHE", path.parent)
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    monkeypatch.setitem(clip.MODELS, "ViT-B/16", sha256(path.read_bytes()).hexdigest())
    return path


def test_a_known_name_is_downloaded_and_verified(published: Path, small_clip: nn.Module) -> None:
    assert set(load_text_weights("ViT-B/16")) == set(text_half(small_clip))
    assert clip.load_clip_weights("ViT-B/16", "weights").name == "ViT-B/16"
    published.write_bytes(published.read_bytes()[:-1])
    with pytest.raises(StaleError, match="ViT-B-16.pt could not be downloaded .*; download it yourself to .*16.pt"):
        load_text_weights("ViT-B/16")
    with pytest.raises(StaleError, match="absent.pt.*ViT-B/16"):
        load_text_weights("absent.pt")


def test_only_known_files_get_a_name_and_others_say_what_is_assumed(
    published: Path, small_clip: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    load_text_weights(published)
    assert not caplog.messages
    torch.save(small_clip.state_dict(), tmp_path / "other.pt")
    for _ in range(2):
        load_text_weights(tmp_path / "other.pt")
    assert [message.split(": ")[1] for message in caplog.messages] == [
        "no file of OpenAI's; QuickGELU is assumed, open_clip's weights mostly need gelu"
    ]
    assert clip.load_clip_weights(tmp_path / "other.pt", "weights").name == ""


@torch.no_grad()
def test_exact_gelu_is_kept_by_a_checkpoint(small_clip: nn.Module, tmp_path: Path) -> None:
    torch.save(small_clip.state_dict(), tmp_path / "clip.pt")
    config = TextConfig(prompt="template")
    quick, exact = (
        TextEncoder(TextTransformer.from_weights(load_text_weights(tmp_path / "clip.pt", name)), config)
        for name in ("quick_gelu", "gelu")
    )
    model = copy.deepcopy(small_clip)
    for block in model.transformer.resblocks:
        block.mlp.gelu = nn.GELU()
    expected = model.encode_text(padded_tokens([config.template.format(phrase) for phrase in PHRASES]))
    again = TextEncoder(TextTransformer(exact.transformer.state_dict()), config)
    again.load_state_dict(exact.state_dict())
    prompts = exact.tokenize(PHRASES)
    for encoder in (exact, again):
        torch.testing.assert_close(encoder(prompts), expected, atol=1e-5, rtol=1e-5)
    assert (quick(prompts) - expected).abs().max() > 1e-3


def hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names of transformers' CLIPModel."""
    names = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    }
    found = {names.get(name, name): tensor for name, tensor in state.items()}
    found["text_projection.weight"], found["visual_projection.weight"] = (
        found.pop(name).T for name in ("text_projection", "visual.proj")
    )
    for name in list(found):
        new = name.replace("visual.transformer.resblocks", "vision_model.encoder.layers")
        new = new.replace("transformer.resblocks", "text_model.encoder.layers").replace(".ln_1", ".layer_norm1")
        new = new.replace(".ln_2", ".layer_norm2").replace("c_fc", "fc1").replace("c_proj", "fc2")
        new = new.replace("visual.ln_pre", "vision_model.pre_layrnorm").replace("attn.out", "self_attn.out")
        new = new.replace("visual.ln_post", "vision_model.post_layernorm")
        tensor = found.pop(name)
        if ".attn.in_proj_" in new:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[new.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = rows
        else:
            found[new] = tensor
    return found


@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.parametrize("form", ["plain", "half", "archive", "hugging face", "safetensors", "open_clip checkpoint"])
def test_weights_in_every_form_hold_the_same_tensors(tmp_path: Path, small_clip: nn.Module, form: str) -> None:
    state, path = dict(small_clip.state_dict()), tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "half":
        state = {name: tensor.half() for name, tensor in state.items()}
    if form == "archive":
        archive(path, small_clip)
    elif form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in hugging_face(state).items()}, path)
    elif form == "open_clip checkpoint":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save(hugging_face(state) if form == "hugging face" else state, path)
    loaded = clip.load_clip_weights(path, "weights").state
    assert set(loaded) >= set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    text = load_text_weights(path)
    assert set(text) == set(text_half(small_clip))
    kept = text.pop("token_embedding.weight")
    assert (kept.dtype, {t.dtype for t in text.values()}) == (state["token_embedding.weight"].dtype, {torch.float32})
    transformer = TextTransformer.from_weights({**text, "token_embedding.weight": kept})
    assert (transformer.width, transformer.output_width, transformer.context_length) == (128, 32, 77)
    assert len(transformer.transformer["resblocks"]) == 2


def test_an_archive_is_read_without_running_it(tmp_path: Path) -> None:
    class Endless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_projection = nn.Parameter(torch.eye(2))

        def forward(self, x: Tensor) -> Tensor:
            return x

        @torch.jit.export
        def __getstate__(self) -> int:
            return 0

        @torch.jit.export
        def __setstate__(self, state: int) -> None:
            while True:
                state += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Endless()).save(tmp_path / "endless.pt")
    with pytest.raises(StaleError, match="endless.pt"):
        load_text_weights(tmp_path / "endless.pt")
