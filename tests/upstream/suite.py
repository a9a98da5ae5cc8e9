"""transformers' model tests on one family of models; `run.py` copies this file beside the mixins and runs it there."""

import unittest

import torch
from transformers import set_seed
from transformers.generation.configuration_utils import GenerationConfig

from . import test_executorch, test_fsdp_mixin, test_tensor_parallel_mixin
from .classes import ALL_CLASSES, FAMILY, HEADS, Base, CausalLM, Config
from .families import TINY
from .generation.test_utils import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_training_mixin import TrainingTesterMixin

# Processes may share a core, and these models are tested though they are not on upstream's list of those worth the
# time.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 8
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class ModelTester:
    """The tiny model of upstream's ``CausalLMModelTester``."""

    base_model_class = Base
    causal_lm_class = CausalLM
    sequence_classification_class = HEADS[0]
    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, intermediate_size = TINY["vocab_size"], TINY["hidden_size"], TINY["intermediate_size"]
    num_hidden_layers, num_attention_heads = TINY["num_hidden_layers"], TINY["num_attention_heads"]

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        sizes = {name: getattr(self, name, value) for name, value in TINY.items()}
        return Config(**sizes | FAMILY.options)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class ModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    model_tester = None
    all_model_classes = ALL_CLASSES
    model_split_percents = (0.5, 0.7, 0.8)
    _torch_compile_train_cls = CausalLM

    def setUp(self):
        self.model_tester = ModelTester(self)

    def test_config(self):
        ConfigTester(self, config_class=Config, hidden_size=64).run_common_tests()

    def test_model(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = Base(config).eval()
        for mask in (inputs["attention_mask"], None):
            assert model(inputs["input_ids"], attention_mask=mask).last_hidden_state.shape == (13, 7, 32)


class TensorParallelTest(test_tensor_parallel_mixin.TensorParallelTesterMixin, unittest.TestCase):
    model_tester = None
    all_model_classes = ALL_CLASSES
    setUp = ModelTest.setUp


class FSDPTest(test_fsdp_mixin.FSDPTesterMixin, unittest.TestCase):
    model_tester = None
    setUp = ModelTest.setUp


class ExecutorchTest(test_executorch.ExecutorchTest):
    def setUp(self):
        """Upstream's, with a model that need not be downloaded."""
        set_seed(42)
        self.model = CausalLM(ModelTester(self).get_config()).eval()
        self.model.generation_config = GenerationConfig(
            use_cache=True,
            cache_implementation="static",
            cache_config={"batch_size": 1, "max_cache_len": 32, "device": "cpu"},
        )
        self.input_ids = torch.tensor([[1, 2, 3]])
        self.inputs_embeds = torch.randn(1, 3, self.model.config.hidden_size)
        self.cache_position = torch.arange(3)
