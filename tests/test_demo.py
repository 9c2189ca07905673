"""Generated data are the same bytes wherever and whenever they are made."""

from pathlib import Path

from data_pipelines.demo import DemoConfig, make_demo


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two", "three"):
        config = DemoConfig(photos=6, clips=24, heldout=6, per_shard=32, side=32, frames=8)
        make_demo(tmp_path / name, config)
        tars = sorted((tmp_path / name).rglob("*.tar"))
        made.append({str(tar.relative_to(tmp_path / name)): tar.read_bytes() for tar in tars})
    assert made[0] == made[1] == made[2] and len(made[0]) >= 4
