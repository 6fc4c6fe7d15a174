"""Inputs and error budgets, shared by tests and benchmarks."""

from simmim_fast.testing.guards import Guards, backend_keys
from simmim_fast.testing.inputs import (
    bias_gelu_inputs,
    biased_attention_inputs,
    differentiable,
    linear_masked_loss_inputs,
    masked_l1_loss_inputs,
    masked_patch_embed_inputs,
    permuted,
    random_tensor,
    residual_layer_norm_inputs,
    shifted_window_attention_inputs,
    small_inputs,
    substitute_mask_tokens_inputs,
)
from simmim_fast.testing.rules import (
    assert_equal,
    assert_ignores_threads,
    assert_matches,
    assert_repeats,
    assert_right,
    assert_within_budget,
    random_gradient,
    relative_error,
    run,
)

__all__ = [
    "Guards",
    "assert_equal",
    "assert_ignores_threads",
    "assert_matches",
    "assert_repeats",
    "assert_right",
    "assert_within_budget",
    "backend_keys",
    "bias_gelu_inputs",
    "biased_attention_inputs",
    "differentiable",
    "linear_masked_loss_inputs",
    "masked_l1_loss_inputs",
    "masked_patch_embed_inputs",
    "permuted",
    "random_gradient",
    "random_tensor",
    "relative_error",
    "residual_layer_norm_inputs",
    "run",
    "shifted_window_attention_inputs",
    "small_inputs",
    "substitute_mask_tokens_inputs",
]
