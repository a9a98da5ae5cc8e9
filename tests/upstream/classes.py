"""The classes under test, by the variables UPSTREAM_FAMILY and UPSTREAM_CLASSES; every process of `run.py` imports
them first.
"""

import functools
import os
import threading
from pathlib import Path

import torch
import transformers

from .families import FAMILIES

FAMILY = FAMILIES[os.environ["UPSTREAM_FAMILY"]]
CLASSES = os.environ["UPSTREAM_CLASSES"]
RECORDINGS = os.environ["UPSTREAM_RECORDINGS"]

Config = getattr(transformers, FAMILY.config)
Base = getattr(transformers, FAMILY.base)
CausalLM = getattr(transformers, FAMILY.causal_lm)
# The heads that this library does not replace are upstream's, around upstream's model.
HEADS = tuple(getattr(transformers, name) for name in FAMILY.heads)


class Inside(threading.local):
    """Whether this thread is in a call that the suite measures."""

    now = False


inside = Inside()


def observed(forward):
    """``forward`` with statistics in every call. Tests of compilation see upstream's own call."""

    @functools.wraps(forward)
    def measured(self, *args, **kwargs):
        # A model that contains this one already measures.
        if inside.now or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        inside.now = True
        try:
            return forward(self, *args, **kwargs, output_attention_stats=True)
        finally:
            inside.now = False

    return measured


def note(line):
    """Add ``line`` to the count of `run.py`; of one system call, since many processes write."""
    with Path(RECORDINGS).open("ab", buffering=0) as file:
        file.write(" ".join(line.split()).encode() + b"\n")


def recorded(method, model_of=lambda self: self):
    """``method`` inside ``record``, unless a method around it records already or a graph is being traced."""
    from llama_attn import record

    @functools.wraps(method)
    def measured(self, *args, **kwargs):
        if inside.now or torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        recording = record(model_of(self))
        try:
            recording.__enter__()
        except ValueError as refusal:
            note(f"refused: {refusal}")
            return method(self, *args, **kwargs)
        inside.now = True
        try:
            result = method(self, *args, **kwargs)
        except BaseException as error:
            if recording.__exit__(type(error), error, error.__traceback__):
                raise AssertionError("the recording swallowed an exception of its body") from error
            raise
        finally:
            inside.now = False
        try:
            recording.__exit__(None, None, None)
            forwards = len(recording.forwards)
        except ValueError as refusal:
            note(f"refused: {refusal}")
        else:
            note("recorded" if forwards else "empty")
        return result

    return measured


if CLASSES in ("ours", "observed"):
    import llama_attn

    Base, CausalLM = llama_attn.LlamaModel, llama_attn.LlamaForCausalLM
if CLASSES == "observed":
    for _class in (Base, CausalLM):
        _class.forward = observed(_class.forward)
if CLASSES == "recorded":
    for _class in (Base, CausalLM, *HEADS):
        _class.__call__ = recorded(_class.__call__)
    CausalLM.generate = recorded(CausalLM.generate)
    _Compiled = torch._dynamo.OptimizedModule
    _Compiled.__call__ = recorded(_Compiled.__call__, lambda self: self._orig_mod)

ALL_CLASSES = (Base, CausalLM, *HEADS)
