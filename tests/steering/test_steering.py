"""Interventions inside a PyTorch model: where they act, however the batch is padded or decoded."""

import pytest
import torch

from reft_edge.adapter.config import AdapterConfig
from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import decoder_layers
from reft_edge.steering.hooks import steered
from reft_edge.steering.interventions import Interventions
from tests.helpers.torch_reference import logits, random_adapter

ROW = [5, 80, 33, 120, 7, 61, 19, 200, 44, 3]


def interventions(model, **fields):
    return Interventions.from_adapter(random_adapter(model, **fields))


def hidden_after(model, layer, run):
    seen = []
    handle = decoder_layers(model)[layer].register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    run()
    handle.remove()
    return seen[-1].detach()


@pytest.mark.parametrize(
    ("positions", "expected"), [("f2+l1", {0, 1, 9}), ("all", set(range(10))), ("l3", {7, 8, 9})]
)
def test_only_the_named_tokens_of_the_block_change(tiny_model, positions, expected):
    base = hidden_after(tiny_model, 1, lambda: logits(tiny_model, ROW))
    with steered(tiny_model, (interventions(tiny_model, positions=positions, layers=(1,)), 1.0)):
        edited = hidden_after(tiny_model, 1, lambda: logits(tiny_model, ROW))
    changed = (edited - base).abs().amax(-1)[0] > 0
    assert set(changed.nonzero().flatten().tolist()) == expected


def test_the_block_after_steering_is_the_base_again(tiny_model):
    before = logits(tiny_model, ROW)
    with steered(tiny_model, (interventions(tiny_model), 1.0)):
        assert not torch.equal(logits(tiny_model, ROW), before)
    assert torch.equal(logits(tiny_model, ROW), before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_move_positions(tiny_model, side):
    rows = [ROW, ROW[:6]]
    with steered(tiny_model, (interventions(tiny_model, positions="f3+l3"), 1.0)), torch.no_grad():
        alone = [logits(tiny_model, row) for row in rows]
        pad = len(rows[0]) - len(rows[1])
        ids = torch.tensor([rows[0], [1] * pad + rows[1] if side == "left" else rows[1] + [1] * pad])
        mask = torch.tensor([[1] * 10, [0] * pad + [1] * 6 if side == "left" else [1] * 6 + [0] * pad])
        together = tiny_model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    torch.testing.assert_close(together[0], alone[0], atol=1e-4, rtol=0)
    own = together[1, pad:] if side == "left" else together[1, :6]
    torch.testing.assert_close(own, alone[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions", ["f2+l2", "gen", "all+gen"])
def test_generate_with_a_cache_equals_one_pass(tiny_model, positions):
    """transformers' own generate, decode steps and all, against a pass that is told the prompt's length."""
    tokens = torch.tensor([ROW])
    with steered(tiny_model, (interventions(tiny_model, positions=positions), 1.0)) as steering:
        answer = tiny_model.generate(
            tokens,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=-1,
            pad_token_id=1,
        )
        with torch.no_grad(), steering.prompts(torch.tensor([len(ROW)])):
            whole = tiny_model(input_ids=answer.sequences).logits[0, len(ROW) - 1 : -1]
    torch.testing.assert_close(torch.cat(answer.logits), whole, atol=1e-4, rtol=0)


def test_two_adapters_add_up(tiny_model):
    one = interventions(tiny_model, layers=(1,), seed=1, positions="f3+l3")
    two = interventions(tiny_model, layers=(1,), seed=2, positions="all", intervention="direft")
    base = hidden_after(tiny_model, 1, lambda: logits(tiny_model, ROW))
    deltas = []
    for adapters in ([(one, 1.0)], [(two, 0.5)], [(one, 1.0), (two, 0.5)]):
        with steered(tiny_model, *adapters):
            deltas.append(hidden_after(tiny_model, 1, lambda: logits(tiny_model, ROW)) - base)
    torch.testing.assert_close(deltas[2], deltas[0] + deltas[1], atol=1e-4, rtol=0)


def test_an_adapter_for_another_shape_is_refused(tiny_model):
    config = AdapterConfig("loreft", "b", "0", 32, 5, (0,), 2)
    with (
        pytest.raises(ReftEdgeError, match="for 5 layers of size 32; this model has 3 of 64"),
        steered(tiny_model, (Interventions(config), 1.0)),
    ):
        pass


@pytest.mark.parametrize(("intervention", "dropped"), [("loreft", True), ("consreft", False)])
def test_dropout_acts_on_the_whole_edited_state(tiny_model, intervention, dropped):
    """As in pyreft: on h' of the edited tokens, not on the edit alone; ConsReFT has none."""
    adapter = random_adapter(tiny_model, intervention, positions="l2", layers=(1,))
    exact, random = Interventions.from_adapter(adapter), Interventions.from_adapter(adapter, dropout=0.5)
    torch.manual_seed(0)
    with steered(tiny_model, (exact, 1.0)):
        expected = hidden_after(tiny_model, 1, lambda: logits(tiny_model, ROW))[0]
    with steered(tiny_model, (random, 1.0)):
        found = hidden_after(tiny_model, 1, lambda: logits(tiny_model, ROW))[0]
    torch.testing.assert_close(found[:8], expected[:8])
    zeros = found[8:] == 0
    assert (0.3 < float(zeros.float().mean()) < 0.7) == dropped
    torch.testing.assert_close(found[8:][~zeros], expected[8:][~zeros] * (2 if dropped else 1))
