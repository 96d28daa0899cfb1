"""``ringfence explain`` of a Hugging Face config: layers that stand for others, machines that are asked about."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ringfence
from ringfence.cli import main
from ringfence.commands.terminal import USAGE
from ringfence.compile_passes.assignment import Limit
from ringfence.compile_passes.match import Site
from ringfence.explaining import AskedAs, _compiled, _Compiler, explain_config
from ringfence.fake_model import ModelCall
from ringfence.layers import Cut, Folding, fold, record_layers
from ringfence.machines import GPUS, find_gpu, planned
from support import run_python

TINY: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=64,
)


def gemma(layers: int) -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(**TINY, num_hidden_layers=layers, sliding_window=4, sliding_window_pattern=2)


def deepseek(layers: int) -> Any:
    from transformers import DeepseekV3Config

    sizes = dict(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=64, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3Config(**sizes, num_hidden_layers=layers, first_k_dense_replace=1)


# -- which layers stand for which -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "kept", "cuts"),
    [
        ("aaaa", [0, 1, 3], [(2, 1, 1)]),
        ("aaa", [0, 1, 2], []),
        ("abab", [0, 1, 2, 3], []),
        ("abababab", [0, 1, 2, 3, 6, 7], [(4, 2, 2)]),
        ("abababababa", [0, 1, 2, 3, 8, 9, 10], [(4, 4, 2)]),
        ("xxaaaaaay", [0, 1, 2, 3, 7, 8], [(4, 3, 1)]),
        ("aaaaabbbbb", [0, 1, 4, 5, 6, 9], [(2, 2, 1), (7, 2, 1)]),
        ("abcdef", [0, 1, 2, 3, 4, 5], []),
    ],
)
def test_equal_layers_are_left_out(kinds: str, kept: list[int], cuts: list[tuple[int, int, int]]) -> None:
    folding = fold("model.layers", list(kinds))
    assert list(folding.kept) == kept and [dataclasses.astuple(cut) for cut in folding.cuts] == cuts
    traced = "".join(kinds[i] for i in folding.kept)
    pairs = {kinds[i : i + 2] for i in range(len(kinds))}
    assert {traced[i : i + 2] for i in range(len(traced))} == pairs, "every pair of neighbours was traced"


class Layer(nn.Module):
    def __init__(
        self, index: int, *, width: int = 8, scale: float = 1.0, special: int | None = None, dtype: Any = torch.float32
    ) -> None:
        super().__init__()
        self.layer_idx, self.scale, self.special, self.dtype = index, scale, special, dtype
        self.first, self.second = nn.Linear(8, width, dtype=dtype), nn.Linear(width, 8, dtype=dtype)

    def forward(self, x: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
        y = self.second(self.first(x.to(self.dtype)) * self.scale)
        if self.layer_idx == self.special:  # what no attribute shows beforehand
            y = y.relu()
        caches[self.layer_idx].copy_(y)
        return x + y


class Swapped(Layer):
    def forward(self, x: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
        y = self.second(self.first(x.to(self.dtype)) * self.scale)
        caches[self.layer_idx].copy_(y)
        return y + x


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, caches)
        return x


@pytest.mark.parametrize(
    "odd",
    [
        lambda i: Layer(i, width=16),
        lambda i: Layer(i, scale=0.5),
        lambda i: Layer(i, special=i),
        lambda i: Swapped(i),
        lambda i: Layer(i, dtype=torch.float16),
    ],
    ids=["shape", "constant", "index", "order of operands", "dtype"],
)
def test_a_layer_that_does_another_thing_is_another(odd: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Stack(*[odd(i) if i == 3 else Layer(i) for i in range(6)])
        records = record_layers(model, model.layers, torch.zeros(2, 8), [torch.zeros(2, 8) for _ in range(6)])
    assert len(set(records)) == 2 and records.count(records[3]) == 1


def test_a_layer_that_is_not_called_is_like_no_other() -> None:
    with FakeTensorMode():
        model = Stack(*[Layer(i) for i in range(4)])
        model.forward = lambda x, c: model.layers[0](x, c)  # type: ignore[method-assign]
        records = record_layers(model, model.layers, torch.zeros(2, 8), [torch.zeros(2, 8) for _ in range(6)])
    assert len(set(records)) == 4
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.layers), "nothing stays behind"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "call"), [(gemma(8), ModelCall(1, 2)), (deepseek(5), ModelCall(2, 1, 16))], ids=["prefill", "decode"]
)
def test_what_layers_stand_for_is_what_a_trace_of_all_finds(config: Any, call: ModelCall) -> None:
    """Site by site, piece by piece, verdict by verdict, and the proof."""
    asked = AskedAs(2, "mnnvl", "0.7.0")
    options = {"capture_sizes": [1, 2, 4], "split_ops": ["aten::silu", "aten::gelu"]}
    (some,) = explain_config(config, 2, [call], dtype="bfloat16", asked=asked, options=options)
    (every,) = explain_config(config, 2, [call], dtype="bfloat16", asked=asked, options=options, fold=False)
    assert some.folding is not None and every.folding is None
    assert len(some.report.fused) >= 9 and len(some.report.pieces) >= 9

    def facts(report: ringfence.CompileReport) -> dict[str, Any]:
        found = report.to_dict()
        for verdict in found["verdicts"]:  # the names of nodes are the traced graph's
            del verdict["node"]
        del found["notes"]
        return found

    one, other = facts(some.report), facts(every.report)
    for name in one:
        assert one[name] == other[name], name


@pytest.mark.usefixtures("fake_group")
def test_moe_sites_are_those_of_all_layers_too() -> None:
    """Of six layers of experts, three of which were traced."""
    import moe_graphs

    class Experts(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(moe_graphs.Layer() for _ in range(layers))

        def forward(self, x: torch.Tensor, lean: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, lean, live)
            return x

    def report(layers: int, folding: Folding | None) -> ringfence.CompileReport:
        backend = _Compiler(planned(2, None, None, None, "bfloat16"), folding, {"moe_dispatch": True}, runs=False)
        return _compiled(Experts(layers), moe_graphs.given(8, 0), {}, backend)

    some = report(3, Folding("layers", (0,) * 6, (0, 1, 5), (Cut(2, 3, 1),)))
    every = report(6, None)
    modules = [f"layers.{i}" for i in range(6)]
    assert [site.module for site in every.moe_sites] == modules == [site.module for site in some.moe_sites]
    assert [site.index for site in some.moe_sites] == list(range(6))
    assert all(site.rewritten for site in some.moe_sites)
    assert [piece.nodes for piece in some.pieces] == [piece.nodes for piece in every.pieces]
    text = some.text()
    assert sum("dispatch and combine" in line for line in text.splitlines()) == 1
    assert any(line.split() == ["1-5", "layers.1-5:", "as", "layers.0"] for line in text.splitlines())


# -- machines -----------------------------------------------------------------------------------------


def test_a_gpu_is_asked_what_auto_would_choose() -> None:
    two, eight = planned(2, None, None, "h200", "bfloat16"), planned(8, None, "0.7.0", "H200", "bfloat16")
    assert two.named == "ringfence on 2 H200 over an NVSwitch"
    assert eight.named == "trtllm of FlashInfer 0.7.0 on 8 H200 over an NVSwitch"
    assert eight.candidates[-1] == "trtllm/peer: chosen" and eight.situation.capability == (9, 0)
    none = planned(4, None, None, "l40s", "bfloat16")
    site = Site(0, "n", "all_reduce_rms_norm", None, "0", "bfloat16", 8192, 1e-6, False, None, None)
    assert none.situation.collective == "reference" and none.limit(site) == Limit(
        (), "no kernels are to be had on 4 L40S over PCIe"
    )
    limits = {flashinfer: planned(2, "trtllm", flashinfer, "h200", "bfloat16") for flashinfer in ("0.7.0", "0.7.2")}
    assert [p.limit(site).most for p in limits.values()] == [512, 2048], "two-shot is used from 0.7.2 on"
    assert planned(2, "trtllm", None, None, "bfloat16").limit(site) is None
    assert "is not supported" in planned(2, None, "0.6.10", "h200", "bfloat16").candidates[0]
    insisted = planned(8, "mnnvl", "0.6.10", "h200", "bfloat16")
    assert insisted.situation.collective == "mnnvl" and "cannot be had" in str(insisted.why_not)
    assert find_gpu("GB200") is GPUS["gb200"]
    with pytest.raises(ringfence.OptionsError, match="did you mean 'h200'"):
        find_gpu("h2000")
    with pytest.raises(ringfence.OptionsError, match="uses no FlashInfer"):
        planned(2, "ringfence", "0.7.0", None, "bfloat16")


def test_a_hidden_size_that_kernels_do_not_take_passes_them_over() -> None:
    from transformers import LlamaConfig

    sizes = TINY | {"hidden_size": 2880, "num_hidden_layers": 1}  # GPT-OSS's: 5,760 bytes are no whole warps
    assert ringfence.explain(LlamaConfig(**sizes), tp=2, gpu="h200").judged_as == "ringfence on 2 H200 over an NVSwitch"
    report = ringfence.explain(LlamaConfig(**sizes | {"num_key_value_heads": 8}), tp=8, gpu="h200")
    assert report.judged_as == "reference on 8 H200 over an NVSwitch"
    assert any("hidden size 2880" in candidate and "warps" in candidate for candidate in report.candidates)
    assert not dist.is_initialized()


def test_options_of_who_carries_out_the_sites_are_honoured() -> None:
    def asked(gpu: str | None = "h200", **options: Any) -> AskedAs:
        return AskedAs(2, gpu=gpu).with_options(options)

    assert asked(None, collective="mnnvl").planned("bfloat16") == AskedAs(2, "mnnvl").planned("bfloat16")
    assert asked(collective="trtllm").planned("bfloat16") == AskedAs(2, "trtllm", gpu="h200").planned("bfloat16")
    assert str(asked(collective="reference").planned("bfloat16").named) == "reference on 2 H200 over an NVSwitch"
    assert not any("multicast" in why for why in asked(transport="peer").planned("bfloat16").candidates)
    with pytest.raises(ringfence.CollectiveUnavailableError, match="deterministic=True cannot be had"):
        AskedAs(8, gpu="h200").with_options({"deterministic": True, "max_tokens": 8}).planned("bfloat16")
    assert asked().with_options({}) == AskedAs(2, gpu="h200")
    with pytest.raises(ringfence.OptionsError, match="collective mnnvl, and --option collective=trtllm: give one"):
        AskedAs(2, "mnnvl").with_options({"collective": "trtllm"})
    with pytest.raises(ringfence.OptionsError, match="is not one of"):
        asked(collective="nccl")


def test_options_on_which_nothing_depends_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(gemma(1).to_dict()))
    given = [f"--option={pair}" for pair in ("collective=mnnvl", "transport=peer", "on_hang=abort", "verify=True")]
    assert main(["explain", str(tmp_path), "--tp", "2", "--flashinfer", "0.7.2", *given]) == 0
    out = capsys.readouterr().out
    assert ", judged as mnnvl of FlashInfer 0.7.2; " in out
    idle = "note: nothing in a plan depends on these options: transport, on_hang; with --gpu: transport"
    assert idle in out.splitlines()
    assert AskedAs(2, gpu="h200").idle({"transport": "peer", "capture_sizes": [1]}) is None


def test_from_python_a_config_or_a_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**TINY, num_hidden_layers=5)
    before = config.to_dict()
    config.save_pretrained(tmp_path)
    one = ringfence.explain(config, tp=2, decode=True, capture_sizes=[1])
    other = ringfence.explain(tmp_path, tp=2, decode=True, capture_sizes=[1])
    assert one.to_dict() == other.to_dict() and len(one.fused) == 10 and one.captured == (1,)
    assert config.to_dict() == before, "whose it is finds it as it was"
    assert len(one.pieces) == 1, "over NCCL its collectives stay in the piece"
    assert "note: 3 of 5 layers were traced" in str(one)
    with pytest.raises(ringfence.OptionsError, match="did you mean 'capture_sizes'"):
        ringfence.explain(config, tp=2, capture_size=[1])
    with pytest.raises(ringfence.OptionsError, match="dtype"):
        ringfence.explain(config, tp=2, dtype=torch.float64)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_a_quantised_config_is_explained_without_it_and_that_is_said(tmp_path: Path, method: str) -> None:
    content = gemma(1).to_dict() | {"quantization_config": {"quant_method": method, "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    report = ringfence.explain(tmp_path, tp=2)
    assert len(report.fused) == 2
    (note,) = [note for note in report.notes if "quantization_config" in note]
    assert note.startswith(f"quantization_config ({method}) is not applied") and "bfloat16" in note


# -- the command, as a user starts it -------------------------------------------------------------------


def test_a_config_alone_is_explained(tmp_path: Path) -> None:
    """And nothing of other libraries stands around the answer."""
    from transformers import LlamaConfig

    LlamaConfig(**TINY | {"hidden_size": 512}, num_hidden_layers=40).save_pretrained(tmp_path)
    picture = tmp_path / "plan.svg"
    asked = ("--tp", "4", "--decode", "--gpu", "b200", "--svg", str(picture))
    ran = run_python("-m", "ringfence", "explain", str(tmp_path), *asked)
    assert ran.returncode == 0, ran.stderr
    head, summary, *rest = ran.stdout.splitlines()
    assert head == "decode: 1 sequence of 1 token, a static cache of 4096 tokens"
    assert summary.startswith("ringfence: 80 of 80 all-reduces fused, judged as ")
    assert "FlashInfer 0.7.2.post1 on 4 B200 over an NVSwitch" in summary
    assert any(line.startswith("note: 3 of 40 layers were traced") for line in rest)
    assert all(line.startswith("ringfence: ") for line in ran.stderr.splitlines()), ran.stderr
    assert picture.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("{", (), "cannot be read as JSON"),
        ("[]", (), "names no model_type"),
        ('{"model_type": "no_such_architecture"}', (), "knows no model type 'no_such_architecture'"),
        (None, ("--tp", "3"), "3 ranks cannot share 8 attention heads; these can: 2, 4, 8"),
        (None, ("--tp", "8"), "8 ranks cannot share 4 key-value heads; these can: 2, 4"),
        (None, ("--gpu", "h2000"), "did you mean 'h200'"),
        (None, ("--context", "9"), "--context is of the static cache of --decode"),
        (None, ("--decode", "--tokens", "9"), "a step of --decode has one token"),
    ],
)
def test_wrong_input_is_one_line_and_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str | None, arguments: tuple[str, ...], message: str
) -> None:
    text = config if config is not None else json.dumps(gemma(2).to_dict())
    (tmp_path / "config.json").write_text(text)
    given = arguments if "--tp" in arguments else ("--tp", "2", *arguments)
    assert main(["explain", str(tmp_path), *given]) == USAGE
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1 and message in lines[0] and not said.out


# -- the picture ------------------------------------------------------------------------------------------


def test_the_picture_has_each_kind_of_layer_once_and_why() -> None:
    """Layers, sites, pieces, islands and reasons, of a plan that is refused and split."""
    from xml.etree import ElementTree

    from ringfence.plan_picture import blocks, svg

    options = {"capture_sizes": [1], "split_ops": ["aten::gelu"], "groups": None}
    asked = AskedAs(2, "mnnvl", "0.6.10")
    (one,) = explain_config(gemma(8), 2, [ModelCall(1, 2)], dtype="bfloat16", asked=asked, options=options)
    found = blocks(one.report)
    assert [(block.title, block.times) for block in found] == [
        ("model.embed_tokens", 1),
        ("model.layers.0 to layers.7", 8),
    ]
    text = " ".join(t.text or "" for t in ElementTree.fromstring(svg(one.report, "gemma, 2 ranks")).iter() if t.text)
    for said in ("REFUSED: 16 of 17", "8 equal layers", "mlp.down_proj", "declined: scale_kind", "M1: ", "aten::gelu"):
        assert said in text, said
    assert "islands" in text and text.count("model.layers.") == 1
