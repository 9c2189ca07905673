"""`xray plan`: parameters, FLOPs and memory compared with modules that are built and run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from child_process import xray
from in_process import invoke
from stage_variants import PROGRESS, VARIANTS
from tiny import SMALL, settings
from torch.utils.flop_counter import FlopCounterMode

from stages import stage_class
from stages.base import Facts, Parents
from stages.clip import ClipModule
from stages.hashtag import HashtagModule
from tools.benchmarks.bench_memory import compare
from xray.artifacts.language_model import Language
from xray.planning.estimate import _rungs, cheapest_fit, memory_of, resources
from xray.planning.fake_step import rehearse, size_of, starts_of
from xray.planning.known_inputs import known
from xray.recipes.recipe import load_recipe

FACTS = Facts(tags=50)
IMAGES = "data.blocks=[{source: photos, samples: 8}]"
QWEN = {  # sizes of Qwen3-0.6B
    **{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128},
    **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
    **{"vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True},
}


def built(config: Any) -> Any:
    """Build the module of a config as a run does."""
    if config.stage == "mae":
        return stage_class("mae")(config).build(Parents())
    if config.stage == "hashtag":
        return HashtagModule(config, [1] * FACTS.tags)
    tower = Language(config.text).build()
    return ClipModule(config, tower, tower.width, None, FACTS.tags)


@pytest.mark.parametrize("stage", ["mae", "hashtag", "clip"])
def test_parameters_equal_those_of_the_built_module(stage: str, demo: Path, tmp_path: Path) -> None:
    config = settings(stage, demo, tmp_path, "optim.vision.freeze=0.5")
    module = built(config)
    size = size_of(config, dataclasses.replace(FACTS, llm=demo / "llm"))
    assert size.trained + size.frozen == sum(p.numel() for p in module.parameters())
    assert size.trained == sum(p.numel() for p in module.parameters() if p.requires_grad)


def attention_flops(query: torch.Size, key: torch.Size, products: int) -> int:
    """FLOPs of matrix products between all of `query` `[B, H, N, D]` and all of `key`."""
    return products * 2 * query[:-1].numel() * key[-2] * query[-1]


# Torch before 2.15 does not count the CPU's attention. Forward: scores and output. Backward: the
# scores again, and the gradients of scores, value, query and key.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, *rest, **kwargs: attention_flops(query, key, 2)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, *rest, **kwargs: attention_flops(query, key, 5)
    ),
}


@pytest.mark.parametrize("stage", ["mae", "hashtag"])
def test_flops_equal_those_of_a_real_step(stage: str, demo: Path, tmp_path: Path) -> None:
    config = settings(stage, demo, tmp_path, IMAGES, "model.keep_rate_span=[0,0]")
    module = built(config)
    batch = stage_class(stage)(config).example_batch(module, 8, 1, 32)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter:
        features = module.features(batch, 1.0)
        forward = counter.get_total_flops()
        module.loss_from_features(features).loss.backward()
    assert rehearse(config, FACTS, 1.0).flops == counter.get_total_flops()
    macs = stage_class(stage)(config).macs(1)  # the usual published count, without the head
    assert forward == 2 * 8 * macs


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("mae", ("model.kwargs={embed_dim: 96, depth: 3, num_heads: 3}", "data.resolution=64")),
        ("clip", ("text.max_length=16", "clip.adapter_blocks=0", "train.micro_batch=4")),
        ("hashtag", ("model.grad_checkpointing=true",)),
        ("hashtag", ("model.grad_checkpointing=mlp",)),
        ("hashtag", ("optim.vision.tune=lora",)),
    ],
)
def test_memory_is_close_to_that_of_a_real_step(stage: str, overrides: tuple[str, ...]) -> None:
    """The plan is within 10 % of the measured memory; bench_memory compares more settings."""
    memory = compare(stage, overrides)
    assert memory["measured"] > 5e6
    assert abs(memory["planned"] / memory["measured"] - 1) < 0.1, memory


# Options that draw numbers on the host, or whose towers read values of their inputs.
QUICK = ("hashtag mixup or cutmix", "hashtag truncate", "text full, causal", "clip mask")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_every_option_can_be_planned(name: str, demo: Path, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    config = settings(variant.stage, demo, tmp_path, *variant.overrides)
    facts = dataclasses.replace(FACTS, llm=demo / "llm")
    assert rehearse(config, facts, PROGRESS).flops > 0


def test_a_part_of_the_tower_takes_less_memory_and_work(demo: Path, tmp_path: Path) -> None:
    """The less, the fewer blocks a gradient passes; a plan of `none` equals one of freeze=1."""
    same = IMAGES, "model.keep_rate=1.0"
    full, lora, bias, last, none, frozen = (
        resources(settings("hashtag", demo, tmp_path, *same, f"optim.vision.{tune}"), FACTS, 1)
        for tune in ("tune=full", "tune=lora", "tune=bias", "tune=last:1", "tune=none", "freeze=1")
    )
    head = none.size.trained
    assert frozen.size == none.size and frozen.memory == none.memory
    assert head < bias.size.trained < lora.size.trained < full.size.trained
    for each in (lora, bias, last):
        assert each.memory.optimizer == 8 * each.size.trained < full.memory.optimizer
        assert none.memory.total < each.memory.total < full.memory.total
        assert each.checkpoint == 12 * each.size.trained
    assert none.flops < last.flops < 0.8 * bias.flops < lora.flops < full.flops


def test_recomputing_mlps_saves_much_memory_for_few_flops(demo: Path, tmp_path: Path) -> None:
    plain, mlp, whole = (
        rehearse(
            settings("hashtag", demo, tmp_path, IMAGES, f"model.grad_checkpointing={value}"),
            FACTS,
            0.0,
        )
        for value in ("false", "mlp", "true")
    )
    assert whole.alone.activations < mlp.alone.activations < 0.7 * plain.alone.activations
    assert plain.flops < mlp.flops < whole.flops
    # of a block's linear layers, the first of the MLP is computed again: 4 of 12 parts
    assert (mlp.flops - plain.flops) / (whole.flops - plain.flops) < 0.5


def test_a_step_is_simulated_at_each_change_of_its_shape(demo: Path, tmp_path: Path) -> None:
    growing = "data.resolution=[[0.0, 16], [0.6, 32]]"
    still = "optim.vision.freeze=0.2", "model.keep_rate=1.0"
    config = settings("mae", demo, tmp_path, growing, *still)
    assert starts_of(config) == [0.0, 0.2, 0.6]
    small, _, large = (rehearse(config, FACTS, start) for start in starts_of(config))
    assert large.flops > 3 * small.flops
    assert large.flops > resources(config, FACTS, 1).flops > small.flops


def test_a_stages_mean_cost_is_the_mean_over_its_steps(demo: Path, tmp_path: Path) -> None:
    """The keep rate falls while the resolution grows, or until the last step."""
    settings_of = IMAGES, "train.samples=80", "model.keep_rate=0.5"
    for span, more in (("[0,0.8]", "data.resolution=[[0.0,16],[0.4,64]]"), ("[0,1]", "seed=0")):
        config = settings(
            "hashtag", demo, tmp_path, *settings_of, f"model.keep_rate_span={span}", more
        )
        steps = [rehearse(config, FACTS, config.progress(k)) for k in range(config.steps)]
        planned = resources(config, FACTS, 1)
        assert planned.tokens == pytest.approx(sum(s.tokens for s in steps) / len(steps))
        assert planned.flops == pytest.approx(sum(s.flops for s in steps) / len(steps), rel=0.03)


def test_ema_weights_are_counted(demo: Path, tmp_path: Path) -> None:
    plain, kept = (
        resources(settings("mae", demo, tmp_path, f"train.ema={ema}"), FACTS, 1)
        for ema in (0.0, 0.9)
    )
    whole = 4 * plain.size.trained
    assert kept.checkpoint - plain.checkpoint == whole
    assert kept.memory.optimizer - plain.memory.optimizer == whole


def test_suggested_zero_stages_are_valid(demo: Path, tmp_path: Path) -> None:
    """ZeRO 3 is not suggested for compiled blocks."""
    config = settings("mae", demo, tmp_path, IMAGES)
    assert {stage for stage, *_ in _rungs(config)} == {0, 1, 2, 3}
    config.train.compile = True
    assert {stage for stage, *_ in _rungs(config)} == {0, 1, 2}


def test_zero_stages_divide_their_states(demo: Path, tmp_path: Path) -> None:
    config = settings("mae", demo, tmp_path)
    size, rehearsal = size_of(config, FACTS), rehearse(config, FACTS, 0.0)
    whole = 4 * size.trained
    memory = {}
    for stage in range(4):
        config.zero = dataclasses.replace(config.zero, stage=stage)
        memory[stage] = memory_of(config, size, rehearsal, 8)
    assert memory[0].optimizer == 2 * whole
    assert memory[1].optimizer == memory[2].optimizer == 3 * whole // 8
    assert (
        memory[1].weights
        == memory[0].weights
        > memory[3].weights
        == -(-(whole + size.frozen_bytes) // 8)
    )
    assert memory[2].gradients <= whole // 8 < memory[1].gradients


def test_copies_for_saving_in_the_background_take_host_memory(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks take turns in writing the files: of four files, three ranks copy at most two."""
    names = "train.save_in_background=true", "train.ema=0.9"
    config = settings("mae", demo, tmp_path, IMAGES, *names)
    alone = resources(config, FACTS, 1)
    assert alone.memory.host == alone.checkpoint == 16 * alone.size.trained
    file = alone.checkpoint // 4 + 1
    assert file > 16 * alone.size.largest
    monkeypatch.setattr("xray.planning.estimate.FILE_BYTES", file)
    size, rehearsal = alone.size, rehearse(config, FACTS, 0.0)
    hosts = [memory_of(config, size, rehearsal, world).host for world in (1, 2, 3, 4, 8)]
    assert hosts == [alone.checkpoint, 2 * file, 2 * file, file, file]
    config.train.save_in_background = False
    assert memory_of(config, size, rehearsal, 2).host == 0


def test_a_frozen_llm_in_bf16_takes_half_the_memory(demo: Path, tmp_path: Path) -> None:
    facts, sizes = dataclasses.replace(FACTS, llm=demo / "llm"), {}
    for tune, rank in (("none", 0), ("lora", 2)):
        for dtype in ("fp32", "bf16"):
            text = f"text.tune={tune}", f"text.lora_rank={rank}", f"text.dtype={dtype}"
            planned = resources(settings("clip", demo, tmp_path, IMAGES, *text), facts, 1)
            sizes[tune, dtype] = planned.memory.llm
            trained = 4 * planned.size.llm_trained
        assert sizes[tune, "bf16"] - trained == (sizes[tune, "fp32"] - trained) / 2 > 0


def test_only_trained_towers_are_recomputed(demo: Path, tmp_path: Path) -> None:
    """The gradient cache runs a frozen LLM once, like one whose vectors are stored."""
    facts, recomputed = dataclasses.replace(FACTS, llm=demo / "llm"), {}
    trained = "text.tune=lora", "text.lora_rank=2"
    for name, text in (
        ("frozen", ("text.tune=none",)),
        ("stored", ("text.tune=none", "text.features=bf16")),
        ("trained", trained),
        ("frozen at first", (*trained, "optim.text.freeze=0.5")),
    ):
        whole, split = (
            rehearse(settings("clip", demo, tmp_path, IMAGES, *text, size), facts, 0.0)
            for size in ("train.micro_batch=0", "train.micro_batch=4")
        )
        recomputed[name] = split.recomputed
        assert split.flops - whole.flops == split.recomputed > 0
    assert recomputed["frozen"] == recomputed["stored"] < recomputed["trained"]
    assert recomputed["stored"] <= recomputed["frozen at first"] < recomputed["trained"]


def test_the_cheapest_change_that_fits_is_suggested(demo: Path, tmp_path: Path) -> None:
    """Smaller micro-batches come first, and the plan confirms that the suggestion fits."""
    config = settings("hashtag", demo, tmp_path, IMAGES)
    now = resources(config, FACTS, 1).memory
    change = cheapest_fit(config, FACTS, 1, 0.8 * now.total)
    assert change is not None and set(change.settings) == {"train.micro_batch"}
    config.train.micro_batch = change.settings["train.micro_batch"]
    assert resources(config, FACTS, 1).memory == change.memory
    assert change.memory.total <= 0.8 * now.total
    assert cheapest_fit(config, FACTS, 1, 0.1 * (now.weights + now.optimizer)) is None


def test_the_command_needs_no_data(tmp_path: Path) -> None:
    items = ["plan", "quickstart", f"data.root={tmp_path}", "--tags", "16"]
    done = invoke(*items, "stages=[mae,hashtag]", "--json")
    assert done.exit_code == 0, done.stderr
    mae, hashtag = json.loads(done.stdout)["stages"]
    assert mae["epochs"] == {"photos": None, "clips": None} and mae["steps"] == 400
    assert hashtag["parameters"] > 0 and hashtag["hours"] > 0
    assert mae["checkpoint_bytes"] == 12 * mae["trained"]
    least = hashtag["memory"]["weights"] + hashtag["memory"]["optimizer"]
    tight = invoke(*items, "stages=[hashtag]", "--gb", str((least + 60e6) / 0.9e9))
    assert tight.exit_code == 1
    assert "hashtag does not fit" in tight.stdout and "train.micro_batch=" in tight.stdout
    unknown = invoke("plan", "quickstart", "--gpu", "h1000")
    assert unknown.exit_code == 2 and "h100" in unknown.stderr


def test_a_missing_llm_is_reported(tmp_path: Path) -> None:
    values = ["text.llm=nobody/has-this", IMAGES, "train.samples=64", "clip.adapter_blocks=0"]
    source = "data.sources={photos: {shards: photos, modality: image}}"
    model = f"model.kwargs={json.dumps(SMALL['model']['kwargs'])}"
    done = invoke("plan", "clip", *values, source, model, "data.resolution=32")
    assert done.exit_code == 0, done.stderr
    assert "text.llm=nobody/has-this is not on this machine" in done.stdout


def test_keys_that_a_recipe_leaves_to_the_user_may_stay_unset() -> None:
    done = invoke("plan", "small", "stages=[clip]")
    assert done.exit_code == 0, done.stderr
    assert "text.llm=<text.llm> is not on this machine" in done.stdout
    shown = invoke("config", "small", "stages=[clip]").stdout
    assert "root: <data.root>" in shown and "llm: <text.llm>" in shown


def test_large_recipes_are_accepted_in_part() -> None:
    done = xray("plan", "vit_l14_256", "stages=[mae]", "--devices", "256", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout)["stages"][0]
    assert row["parameters"] > 303e6 and row["memory"]["total"] < 72e9


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "devices"), [("vit_l14_256", 256), ("vit_h14_1024", 1024)])
def test_large_recipes_are_accepted(recipe: str, devices: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    done = xray("plan", recipe, f"text.llm={tmp_path}", "--devices", str(devices), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["stage"]: row for row in json.loads(done.stdout)["stages"]}
    assert list(rows) == ["mae", "hashtag", "text", "clip"]
    assert rows["clip"]["memory"]["llm"] > 2.3e9


def test_a_simulated_step_keeps_the_random_state(demo: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    rehearse(settings("mae", demo, tmp_path), FACTS, 0.5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_clip_stage_counts_the_llm_of_its_text_stage(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    overrides = ["data.root=x", f"text.llm={tmp_path}", "stages=[text,clip]"]
    runs = load_recipe("real_pretrained", overrides).runs
    runs[1].text.llm = ""  # it takes that of its parent
    with known(runs) as facts:
        assert [own.facts.llm for own in facts] == [tmp_path, tmp_path]
