"""Reading a report back without a browser."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np
import torch
from conftest import tiny_model
from test_viz import Tokenizer

from llama_attn import AttentionStatsConfig
from llama_attn.viz import report

AXES = ("layer", "hidden_layer", "head", "kv_head", "query", "key")


def measured(ids, mask=None, model=None, statistics="all", norms=True, tokens=True, **settings):
    config = AttentionStatsConfig(statistics=statistics, norms=norms, **settings)
    with torch.no_grad():
        stats = (model or tiny_model())(ids, attention_mask=mask, output_attention_stats=config).attention_stats
    numbers = torch.arange(ids.numel()).view(ids.shape)
    return stats.with_tokens(Tokenizer(), numbers) if tokens else stats


class Page:
    """A report, read back without a browser."""

    def __init__(self, path):
        self.html = path.read_text("utf-8")
        self.blocks = dict(
            re.findall(r'<script type="application/octet-stream" id="(\w+)">([\w+/=]*)</script>', self.html)
        )
        self.about = json.loads(self.inflate("about"))

    def inflate(self, name):
        return zlib.decompress(base64.b64decode(self.blocks[name]))

    def __contains__(self, name):
        return name in self.about["arrays"]

    def array(self, name):
        """The numbers of an array, and how far each may be off."""
        entry = self.about["arrays"][name]
        planes = np.frombuffer(self.inflate(entry["id"]), np.uint8)
        size = int(entry["dtype"][1])
        values = np.ascontiguousarray(planes.reshape(size, -1).T).view("<" + entry["dtype"]).reshape(entry["shape"])
        if "scale" not in entry:
            return values, np.zeros(values.shape)
        scale, low, step = (
            np.reshape(entry[key], (-1,) + (1,) * (values.ndim - 1)) for key in ("scale", "low", "step")
        )
        numbers = np.where(values == 0, np.nan, scale * np.sinh(low + step * (values.astype(float) - 1)))
        return numbers, entry["rounding"] * np.maximum(np.abs(numbers), scale)

    def stated(self, name, layer):
        """The stated rounding of a layer as tolerances of `assert_allclose`."""
        entry = self.about["arrays"][name]
        return {"rtol": entry["rounding"], "atol": entry["rounding"] * entry["scale"][layer]}

    def check(self, name, expected):
        """Within the stated rounding, beside that of means in float32; NaN where NaN is."""
        numbers, allowed = self.array(name)
        expected = np.asarray(expected, dtype=float)
        np.testing.assert_array_equal(np.isnan(numbers), ~np.isfinite(expected), err_msg=name)
        known = np.isfinite(expected)
        allowed = allowed + np.finfo(np.float32).eps * np.abs(expected)
        assert (np.abs(numbers - expected)[known] <= allowed[known]).all(), name


def written(source, tmp_path, **settings):
    return Page(report(source, tmp_path / "report.html", **settings))


def ordered(values):
    return values.transpose(*[axis for axis in AXES if axis in values.dims]).values
