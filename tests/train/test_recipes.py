"""The released recipe holds the paper's numbers; fields are set by type; the dry run adds up."""

import subprocess
import sys
from pathlib import Path

import pytest

from lens.config import LensConfig
from train import configs, cost
from train import pretrain_on_shards as flow
from train.__main__ import main
from train.loop.lora import lora_of
from train.objectives.flow_matching import mu_of

ROOT = Path(__file__).parents[2]
STAGE_A = configs.load("released/pretrain_512", "pretrain")
STAGE_B = configs.load("released", "mixed_resolution")


def test_stage_a_is_the_papers():
    a = STAGE_A
    assert (a.STEPS, a.LR, a.BETAS, a.CLIP, a.MU, a.COMPUTE) == (400_000, 2e-4, (0.9, 0.999), 1.0, 1.06, "bfloat16")
    assert a.SLOTS * a.BATCH[512] == 3_072
    assert flow.model_of(a) == LensConfig()
    assert [b.size for b in flow.buckets_of(a)] == [(512, 512)]
    assert a.RECOMPUTE == "block"
    assert a.DECAY == 0  # constant


def test_stage_b_is_the_papers():
    b = STAGE_B
    assert (b.STEPS, b.LR, b.BATCH) == (400_000, 1e-4, {512: 24, 768: 10, 1024: 6})
    assert len(flow.buckets_of(b)) == len({(*bucket.size, bucket.base) for bucket in flow.buckets_of(b)}) == 27
    assert [round(mu_of(b.MU, n), 4) for n in (256, 1024, 2304, 4096, 4232)] == [1.0, 1.06, 1.16, 1.3, 1.3106]
    assert b.BETAS == STAGE_A.BETAS


# what the paper states, and what names no choice
STATED = {"MODEL", "BASES", "ASPECTS", "BATCH", "SLOTS", "MU", "STEPS", "LR", "DECAY", "BETAS", "CLIP", "COMPUTE"}


@pytest.mark.parametrize("recipe", [STAGE_A, STAGE_B], ids=["a", "b"])
def test_every_field_is_stated_or_has_its_reason(recipe):
    named = set(configs.fields(recipe)) - {"PAPER_A100_HOURS"}
    assert named - STATED - set(recipe.OPEN) == set()
    assert set(recipe.OPEN) <= named
    assert all(recipe.OPEN.values())


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ("LR=1", "LR", 1.0),
        ("MU=((256, 1.0), (4096, 1.2))", "MU", ((256, 1.0), (4096, 1.2))),
        ("MU=0.9", "MU", 0.9),
        ("SHEET.steps=5", "SHEET", {"steps": 5, "guidance": 5.0, "base": 1024}),
        ("BATCH.512=3", "BATCH", {512: 3, 768: 10, 1024: 6}),
        ("BASE_WEIGHTS={512: 1.0}", "BASE_WEIGHTS", {512: 1.0}),
        ("ASPECT_WEIGHTS=uniform", "ASPECT_WEIGHTS", "uniform"),
        ("BASES=[512]", "BASES", (512,)),
        ("RECOMPUTE=none", "RECOMPUTE", "none"),
    ],
)
def test_a_field_is_set_by_its_type(change, name, value):
    changed = configs.override(STAGE_B, [change])
    assert getattr(changed, name) == value
    assert type(getattr(changed, name)) is type(value)
    assert getattr(STAGE_B, name) != value
    rest = {k: v for k, v in configs.fields(changed).items() if k != name}
    assert rest == {k: v for k, v in configs.fields(STAGE_B).items() if k != name}
    assert configs.override(changed, ["SEED=9"]).SEED == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("WARM_UP=1", "no field 'WARM_UP'; did you mean WARMUP"),
        ("ZZZ=1", "no field 'ZZZ'; fields: SEED, MODEL"),
        ("LR=fast", "expected float, got str 'fast'"),
        ("LR=True", "expected float, got bool True"),
        ("SLOTS=1.5", "expected int, got float 1.5"),
        ("TIME_STRATIFIED=1", "expected bool, got int 1"),
        ("RECOMPUTE=all", r"expected Literal\['none', 'block', 'selective'\], got str 'all'"),
        ("BETAS=(0.9,)", r"expected tuple\[float, float\]"),
        ("SHEET.stepz=3", "SHEET has no entry 'stepz'; it has steps, guidance, base"),
        ("LR.x=3", "LR has no entry 'x'; it has no table"),
        ("LR", "no value; did you mean LR"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        configs.override(STAGE_B, [change])


RECIPES = sorted(
    f"{path.parent.name}/{path.stem}" for path in (ROOT / "train/configs").glob("*/*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_holds_can_be_set(name):
    recipe = configs.load(name, "")
    for field, value in configs.fields(recipe).items():
        assert getattr(configs.override(recipe, [f"{field}={value!r}"]), field) == value, field
        if isinstance(value, dict):
            for key, own in value.items():
                assert getattr(configs.override(recipe, [f"{field}.{key}={own!r}"]), field) == value, (field, key)


def test_a_table_without_entries_takes_those_of_its_type():
    assert configs.override(STAGE_A, ["MODEL.num_layers=2"]).MODEL == {"num_layers": 2}
    with pytest.raises(ValueError, match=r"--set MODEL\.num_layers=few: expected int, got str 'few'"):
        configs.override(STAGE_A, ["MODEL.num_layers=few"])


def test_a_recipe_is_a_file_anywhere(tmp_path, capsys):
    path = tmp_path / "my_recipe.py"
    path.write_text("from train.configs.released.pretrain_512 import *\n\nLR = 3e-4\n")
    assert main(["pretrain", "--config", str(path), "--set", "SLOTS=8", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "LR = 0.0003\n" in out
    assert "SLOTS = 8\n" in out
    assert main(["pretrain", "--config", str(path), "--dry-run"]) == 0
    assert str(path) in capsys.readouterr().out
    for text, message in (
        ("LR = ", ": SyntaxError"),
        ("from train.nothing import x", ", line 1: ModuleNotFound"),
        ("LR = 1\n\nSLOTS = {}['a']\n", ", line 3: KeyError: 'a'"),
        ("raise SystemExit(3)", ", line 1: SystemExit: 3"),
        ("LR = 10**5000", ".*: ValueError: Exceeds the limit"),
        ("", ": no field"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"--config .*my_recipe\.py{message}"):
            configs.load(str(path), "pretrain")
    with pytest.raises(ValueError, match=r"--config .*gone\.py: no such file"):
        configs.load(str(tmp_path / "gone.py"), "pretrain")


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_begins_from_any_recipe(tmp_path, name):
    """With all its fields, and of its family: what a stage reads of others is found."""
    path = tmp_path / "mine.py"
    path.write_text(f"from train.configs.{name.replace('/', '.')} import *\n\nEXTRA = 1\n")
    given = configs.fields(configs.load(name, ""))
    assert configs.fields(configs.load(str(path), "")) == given | {"EXTRA": 1}
    assert configs.family(str(path)) == configs.family(name) == name.partition("/")[0]
    if (folder := configs.family(name)) != "released":
        stage = name.partition("/")[2]
        expected = configs.load(str(path), "") if stage == "encoder" else configs.load(folder, "encoder")
        assert configs.fields(configs.beside(str(path), "encoder")) == configs.fields(expected)


def test_the_recipes_of_other_stages_are_found_beside_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from train.configs.mini.pretrain import *\n\nLR = 3e-4\n")
    (tmp_path / "encoder.py").write_text("from train.configs.mini.encoder import *\n\nSEED = 77\n")
    assert configs.beside(str(path), "encoder").SEED == 77
    assert configs.beside(str(path), "vae") is configs.load("mini", "vae")
    assert configs.world(str(path)).classes == configs.world("mini").classes
    (tmp_path / "world.py").write_text("from train.configs.mini.world import *\n\nCLASSES = CLASSES[:3]\n")
    assert configs.world(str(path)).classes == configs.world("mini").classes[:3]
    assert configs.world(str(tmp_path / "world.py")).classes == configs.world("mini").classes[:3]
    (tmp_path / "encoder.py").unlink()
    path.write_text("LR = 3e-4\n")
    with pytest.raises(
        ValueError, match=r"mine\.py: no recipe for the stage 'encoder', expected encoder\.py beside it, or"
    ):
        configs.beside(str(path), "encoder")
    assert configs.beside("mini/pretrain_128", "encoder") is configs.load("mini", "encoder")


def test_a_recipe_there_is_not():
    here = (
        "there are released/distill, released/lens_toy, released/mixed_resolution, released/pretrain_512, released/rl$"
    )
    for name in ("released", "released/other"):
        with pytest.raises(ValueError, match=f"no recipe '{name}' for stage 'pretrain' in train/configs; {here}"):
            configs.load(name, "pretrain")
    with pytest.raises(
        ValueError, match=r"; there are mini, mini_gpu, mini/pretrain_128, mini/pretrain_sizes, released/pretrain_512$"
    ):
        configs.load("relesed/pretrain_512", "pretrain")


def test_print_config_names_fields_and_reasons(capsys):
    assert main(["pretrain", "--config", "released/pretrain_512", "--set", "LR=3e-4", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "LR = 0.0003\n" in out
    assert "WARMUP = 2000\n    # open: the rate is called constant" in out
    assert main(["mixed_resolution", "--config", "mini", "--print-config"]) == 0  # Mini's own loop answers, too
    assert "BUCKETS = {64:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "pretrain --config mini --data x",
            "--data: for recipes with SLOTS, such as mini/on_shards; this is mini.pretrain",
        ),
        ("pretrain --config mini/on_shards --lr-scale 2", "--lr-scale: for recipes without SLOTS"),
        ("pretrain --config mini/on_shards", "expected --data SHARDS for mini.on_shards"),
        ("pretrain --config released/pretrain_512 --dry-run --world 136", "136 processes in shards of 8 for 128 slots"),
    ],
)
def test_options_of_the_other_kind_are_refused(command, message):
    with pytest.raises(ValueError, match=message):
        main(command.split())


def test_the_dry_run_adds_up():
    """Against the model's own count, and against 6 FLOPs for each parameter that rows meet, plus attention."""
    config = LensConfig()
    total, block = cost.parameters(config)
    assert total == pytest.approx(4.104e9, rel=1e-3)
    assert block == pytest.approx(84.97e6, rel=1e-3)
    d, f, blocks = config.inner_dim, config.mlp_hidden_dim, config.num_layers
    matrices = 4 * d * d + 3 * d * f  # of one stream of one block
    rows = 1024 + 200
    attention = 3 * 4 * rows * rows * d * blocks
    want = 6 * matrices * rows * blocks + attention
    assert cost.training_flops(config, 1024, [200]) == pytest.approx(want, rel=0.02)
    parts = cost.memory(STAGE_A, config, 8, 128, 24 * rows)
    states = sum(parts[name] for name in ("float32 weights", "gradients", "AdamW moments"))
    assert states == pytest.approx(16 * total / 8)
    alone = cost.memory(STAGE_A, config, 1, 1, 24 * rows)
    assert alone["AdamW moments"] == pytest.approx(8 * total)
    assert sum(cost.memory(configs.override(STAGE_A, ["RECOMPUTE=none"]), config, 8, 128, 24 * rows).values()) > 80e9


def test_the_dry_run_of_adapters_adds_up():
    """16 bytes for each number that trains, two for each that does not; near two thirds of the work."""
    config, changed = LensConfig(), configs.override(STAGE_A, [])
    total, _ = cost.parameters(config)
    changed.LORA = "r=64,alpha=128,targets=attention"
    d, r, last = config.inner_dim, 64, config.num_layers - 1
    trained = (
        config.num_layers * (2 * (r * d + 3 * d * r) + 2 * r * d) + last * 2 * r * d
    )  # qkv of both, out, out of text
    for shard, world in ((8, 128), (1, 1)):
        parts = cost.memory(changed, config, shard, world, 24 * 1224)
        assert parts["frozen weights"] == 2 * total / shard
        assert parts["float32 adapters"] == 4 * trained / shard
        assert sum(parts[name] for name in ("gradients", "AdamW moments", "running average")) == 16 * trained / shard
    assert sum(parts.values()) < 24e9  # one card of the smaller kind
    whole, own = (cost.training_flops(config, 1024, [200], lora) for lora in (None, lora_of(changed)))
    assert 0.66 < own / whole < 0.75
    text = cost.dry_run(changed, 8, 8, "h200", 0.4)
    assert "(2.16 forward passes)" in text
    assert "(3 forward passes)" in cost.dry_run(STAGE_A, 8, 8, "h200", 0.4)
    assert "adapters" in text
    assert "192,000" not in text


def test_the_dry_run_of_96_processes_tells_how_long_some_wait():
    text = cost.dry_run(STAGE_A, 96, 8, "a100", 0.4)
    assert "33% of the time: 128 slots do not divide among 96 processes" in text
    assert "idle" not in cost.dry_run(STAGE_A, 64, 8, "a100", 0.4)


def test_the_dry_run_counts_encoding():
    for side, want in ((512, 1.12e12), (768, 2.61e12), (1024, 4.89e12)):
        assert cost.vae_flops(side * side) == pytest.approx(want, rel=5e-3)
    text = cost.dry_run(STAGE_A, 8, 8, "h200", 0.4)
    assert "more, where latents are not in the shards: 1.12 e12 a picture" in text
    assert "1.44 e12 a picture; the prefix's 97 tokens once" in text


def test_an_estimate_is_held_beside_the_papers_two_sums():
    """192K A100 hours at 312 TFLOP/s are 19.3 % of 314K H800 hours at 989.5, as the paper counts."""
    told = cost.share_of_papers(19_200)
    assert "10.00% of Lens's 192,000" in told
    assert "1.93% of Z-Image's 995,843" in told
    assert "Lens in all 19.3%" in told
    # the same work on another GPU is the same number of A100 hours
    lines = [
        next(line for line in cost.dry_run(STAGE_A, 128, 8, gpu, 0.4).splitlines() if "by peak" in line)
        for gpu in ("a100", "h200")
    ]
    assert lines[0] == lines[1]
    assert [cost.percent(share) for share in (0.161, 0.0001, 0.000029)] == ["16.10%", "0.01%", "0.003%"]
    # an hour of an A100 at 40 % of 312 TFLOP/s, on another GPU in less time
    hour = 0.4 * 312e12 * 3600
    told = cost.hours_of(19_200 * hour, "h200")
    assert told[0].split()[:3] == ["GPU", "hours", f"{19_200 * 312e12 / cost.GPUS['h200'][0]:,.0f}"]
    assert "  19,200 A100 hours by peak: 10.00% of Lens's" in told[1]


def test_the_dry_run_is_quick_and_needs_no_gpu():
    command = [sys.executable, "-m", "train", "mixed_resolution", "--config", "released", "--dry-run"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert "4.104 e9" in done.stdout
    assert "192,000 A100 hours" in done.stdout
    assert done.stdout.count("3.70%") == 27
    assert "1024_2x1" in done.stdout
    assert "1.3106" in done.stdout
