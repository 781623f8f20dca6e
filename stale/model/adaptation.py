"""Vision-language cross-adaptation (B videos, T snippets, K + 1 classes with the background, C joint width)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stale.config import AdaptationConfig
from stale.model.temporal import attend, pass_values_through


class CrossAdaptation(nn.Module):
    """F_lan' = F_lan + α · g · T_c(F_lan, F_fg, F_fg), with the transformer decoder block T_c of [P].

    [ours]: the text enters T_c at unit variance; masked-out snippets are not attended to; attention starts as a mean of
    the foreground. The gate g of a class is the cosine of its text features and that mean, less the mean over the
    classes; 1 with ``gate=false`` [P]. Without ``config.residual``, F_lan' = T_c(F_lan, F_fg, F_fg) [C].
    """

    def __init__(self, width: int, config: AdaptationConfig) -> None:
        super().__init__()
        self.gate = config.gate
        self.decoder = nn.TransformerDecoderLayer(width, config.heads, 4 * width, config.dropout, batch_first=True)
        self.alpha = nn.Parameter(torch.full((width,), config.alpha)) if config.residual else None
        if config.gate:
            pass_values_through(self.decoder.multihead_attn)
            for layer in (self.decoder.self_attn.out_proj, self.decoder.linear2):  # only biases at first
                nn.init.zeros_(layer.weight)

    def forward(self, language: Tensor, visual: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
        """F_lan (K+1, C), F_vis (B, T, C), the factor on it and no padding (B, T) → F_lan' (B, K+1, C), in float32."""
        with torch.autocast(visual.device.type, enabled=False):  # 1 / τ would enlarge the rounding of bfloat16
            language, visual, mask = language.float(), visual.float(), mask.float()
            root = language.shape[-1] ** 0.5
            valid = torch.ones_like(mask, dtype=torch.bool) if valid is None else valid
            present = (mask != 0) & valid
            present = torch.where(present.any(1, keepdim=True), present, valid)  # attention over no key is not defined
            change = self._decode(language * root, visual * mask.unsqueeze(-1), present) / root  # T_c: B × K+1 × C
            if self.alpha is None:
                return change
            if self.gate:
                mean = (visual * present.unsqueeze(-1)).sum(1)  # B × C
                cosine = F.normalize(mean, dim=-1) @ language.T  # B × K+1
                change = change * (cosine - cosine.mean(1, keepdim=True)).unsqueeze(2)
            return language + self.alpha * change

    def _decode(self, language: Tensor, foreground: Tensor, present: Tensor) -> Tensor:
        """T_c as ``self.decoder`` computes it, but the self-attention of the language and its dropout once a batch."""
        layer = self.decoder
        x = language.unsqueeze(0)  # 1 × K+1 × C
        x = layer.norm1(x + layer.dropout1(attend(layer.self_attn, x, x)))
        x = layer.norm2(x + layer.dropout2(attend(layer.multihead_attn, x, foreground, present)))  # B × K+1 × C
        hidden = layer.dropout(layer.linear1(x).relu())
        return layer.norm3(x + layer.dropout3(layer.linear2(hidden)))
