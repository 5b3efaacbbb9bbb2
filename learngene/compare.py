"""`heirloom compare`: initialisation methods at several depths, by accuracy after 0, 1 and n epochs, and cost."""

import json
from argparse import Namespace
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from heirloom.common import config
from heirloom.common.checkpoint.family import Donor, Family
from heirloom.common.data.labelled import open_labelled
from heirloom.common.errors import InputError, nearest, positive
from heirloom.common.files import read_json, staged, write_json
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.notebook.modules import make_callable
from heirloom.common.paths import METRICS
from heirloom.common.surgery.plan import Resolution
from heirloom.common.train import recipe
from heirloom.common.train.metrics import MetricsFile, last_scores
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.parameters import load_params
from heirloom.common.train.parts import Parts
from heirloom.common.train.resume import difference, with_defaults
from heirloom.common.vit.model import VitConfig
from learngene import cost, relatives
from learngene.config import ADAMW, Config, TeacherConfig
from learngene.data import forget
from learngene.evaluate import scorer
from learngene.inputs import preprocess_of
from learngene.labels import labels_of
from learngene.relatives import Method
from learngene.train import held_out
from learngene.zoo import FAMILY, open_classifier


@dataclass(frozen=True)
class Arm:
    """One initialisation method. gene: the trained gene it starts from. distilled: whether the teacher is used too."""

    gene: str = ""
    method: Method = "expand"
    distilled: bool = False
    mimetic: bool = False


ARMS = {
    "scratch": Arm(),
    "mimetic": Arm(mimetic=True),
    "kd": Arm(distilled=True),
    "sws": Arm("sws"),
    "shuffled": Arm("sws", "shuffled"),
    "tleg": Arm("tleg"),
    "untied": Arm("untied", "every"),
    "select": Arm("untied", "select"),
    "heur": Arm("untied", "heur"),
    "auto": Arm("untied", "auto"),
    "stack": Arm("shallow", "stack"),
    "interlace": Arm("shallow", "interlace"),
    "ligo": Arm("shallow", "ligo"),
}
"""kd, untied and shuffled are controls: for the effect of the teacher alone, of sharing, and of the order of stages."""


@dataclass(frozen=True)
class Comparison:
    """Config of a comparison: the recipe of a gene, and the descendants to compare."""

    gene: Config = field(default_factory=Config)
    """The recipe of the SWS gene. Other methods use it with other blocks: TLEG's two, all of them untied (untied,
    select, heur, auto), or as many as the gene has (stack, interlace, ligo).
    """
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Recipe of the teacher, which is trained first if the gene's recipe names none."""
    depths: tuple[int, ...] = (4, 6, 8)
    methods: tuple[str, ...] = ("sws", "scratch")
    """Methods to compare: scratch, mimetic, kd, sws, shuffled, tleg, untied, select, heur, auto, stack, interlace,
    ligo.
    """
    epochs: int = 3
    """Epochs of every descendant, on the gene's data."""
    tune: OptimConfig = field(default_factory=lambda: replace(ADAMW, lr=3e-4))
    """Optimizer of descendants that inherit."""
    scratch: OptimConfig = field(default_factory=lambda: replace(ADAMW, lr=1e-3))
    """Optimizer of descendants that do not inherit; the lower tuning rate would make this baseline too weak."""

    def __post_init__(self) -> None:
        positive(self, "depths", "epochs")

    def train(self, directory: Path) -> None:
        report(self, compare(self, directory))

    def describe(self) -> tuple[Family, VitConfig]:
        return FAMILY, self.gene.student


def compare_command(args: Namespace) -> dict[str, Any]:
    """Run `heirloom compare` on a comparison or a gene's recipe, every field a flag; --cost computes costs only."""
    if args.cost:
        if args.what or args.flags:
            raise InputError("--cost computes the published ratios without a CONFIG: leave CONFIG and its flags out")
        return cost.report(cost.parse_depths(args.cost))
    if not args.what:
        raise InputError("name a recipe to compare with, such as learngene/emoji; or --cost 6-15 for the ratios alone")
    if not args.run:
        raise InputError("give --run DIR, the folder for the runs")
    cfg: Any = config.load(args.what)
    if isinstance(cfg, Config):
        cfg = Comparison(gene=cfg)
    if not isinstance(cfg, Comparison):
        raise InputError(f"{args.what} is not the recipe of a gene: give one of learngene, such as learngene/emoji")
    cfg = config.parse(cfg, _split(args.flags), f"heirloom compare {args.what}")
    results = compare(cfg, args.run)
    report(cfg, results)
    return results


def _split(flags: list[str]) -> list[str]:
    """Rewrite `--methods sws,kd` for tyro: `--methods sws kd`. Lists of numbers are split by `config.parse`."""
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--methods=") else [flag])]
    pairs = zip(["", *flags], flags, strict=False)
    return [part for before, flag in pairs for part in (flag.split(",") if before == "--methods" else [flag])]


def check(cfg: Comparison) -> None:
    """Check a comparison. Raises InputError for an unknown method, and for a depth that a method does not support."""
    student = cfg.gene.student
    if student.gene != "sws":
        raise InputError(f"gene.student.gene is {student.gene!r}: set it to 'sws', which TLEG's recipe is derived from")
    if not cfg.gene.held_out.path:
        raise InputError("the recipe names no held-out data to compare on: give --gene.held-out.path")
    if not cfg.gene.teacher and not cfg.teacher.data.path:
        needed = "give --gene.teacher SOURCE, with the same classes and size"
        raise InputError(f"the recipe names no teacher, and none to train: {needed}")
    for name in cfg.methods:
        if name not in ARMS:
            raise InputError(f"unknown method {name!r}{nearest(name, ARMS)}: choose from {', '.join(ARMS)}")
        for depth in cfg.depths:
            if ARMS[name].gene and ARMS[name].method != "ligo":
                relatives.plan(ARMS[name].method, gene_config(student, ARMS[name].gene), student.of_depth(depth))


def gene_config(student: VitConfig, kind: str) -> VitConfig:
    """Config of a kind's donor: SWS's or TLEG's gene, the untied auxiliary net, or a ViT with a layer per stage."""
    if kind == "tleg":
        return replace(student, gene="tleg", layers=2, layout=(student.depth,))
    plain = {"untied": student.of_depth(student.depth), "shallow": student.of_depth(student.layers)}
    return ({"sws": student} | plain)[kind]


def compare(cfg: Comparison, directory: Path) -> dict[str, Any]:
    """Train all models, each in its own folder, and write `comparison.json`. Finished trainings are not repeated."""
    check(cfg)
    forget()
    teacher = cfg.gene.teacher or train_model(cfg.teacher, directory / "teacher")
    kinds = dict.fromkeys(ARMS[name].gene for name in cfg.methods if ARMS[name].gene)
    gene = replace(cfg.gene, teacher=teacher)
    configs = {kind: replace(gene, student=gene_config(gene.student, kind)) for kind in kinds}
    genes = {kind: train_model(arm, directory / f"gene-{kind}") for kind, arm in configs.items()}
    arms = {}
    for name in cfg.methods:
        for depth in cfg.depths:
            arm = descendant(cfg, name, depth, genes.get(ARMS[name].gene, ""), teacher)
            arms[f"{name}-{depth}"] = {"method": name, "depth": depth} | curve(arm, directory / f"{name}-{depth}")
    results = {
        "teacher": teacher_row(gene, cfg.teacher if not cfg.gene.teacher else None, teacher),
        "genes": {kind: gene_row(arm, directory / f"gene-{kind}") for kind, arm in configs.items()},
        "arms": arms,
    }
    with staged(directory / "comparison.json", force=True) as file:
        write_json(file, results)
    return results


def train_model(cfg: Config, folder: Path) -> str:
    """Train a recipe, or finish its training; returns the SOURCE of its model."""
    recipe.run(cfg, folder)
    return str(folder / "model")


def epoch_steps(cfg: Config) -> int:
    """Optimizer steps of about one epoch."""
    return max(round(len(open_labelled(cfg.data, cfg.label)) / cfg.pipeline.batch), 1)


def descendant(cfg: Comparison, name: str, depth: int, gene: str, teacher: str) -> Config:
    """Recipe of one arm at one depth: labels only unless the arm is distilled; evaluated once an epoch."""
    arm, steps = ARMS[name], epoch_steps(cfg.gene)
    return replace(
        cfg.gene,
        student=cfg.gene.student.of_depth(depth),
        donor=gene if arm.gene else "",
        method=arm.method,
        init="mimetic" if arm.mimetic else "random",
        teacher=teacher if arm.distilled else "",
        optim=cfg.tune if arm.gene else cfg.scratch,
        steps=cfg.epochs * steps,
        eval_every=steps,
        log_every=steps,
        save_every=cfg.epochs * steps,
    )


def curve(arm: Config, folder: Path) -> dict[str, Any]:
    """Train one arm; return accuracy by epoch, from before the first step, and cost (`result.json` in `folder`)."""
    file, about = folder / "result.json", json.loads(json.dumps(asdict(arm)))
    if file.is_file():
        saved = read_json(file)
        if lines := difference(with_defaults(saved["config"], arm), about):
            set_back = "give a new --run, or set these fields back:"
            raise InputError("\n".join([f"{folder} was run with another config: {set_back}", *lines]))
        recipe.unchanged(folder)
        return saved["result"]
    parts = resolve_once(arm.parts())
    before = recipe.evaluate(arm, parts).metrics
    recipe.run(arm, folder, parts)
    scored = [line for line in MetricsFile(folder / METRICS).lines() if "eval/top1" in line]
    result = {
        "top1": [before["top1"], *(line["eval/top1"] for line in scored)],
        "loss": [before["loss"], *(line["eval/loss"] for line in scored)],
        "steps": [0, *(line["step"] for line in scored)],
        "lr": arm.optim.lr,
        "parameters": cost.count(arm.student),
        "macs": cost.forward_macs(arm.student),
        "pictures": arm.steps * arm.pictures,
        "flops": training_flops(arm),
    }
    with staged(file, force=True) as part:
        write_json(part, {"config": about, "result": result})
    return result


def resolve_once(parts: Parts) -> Parts:
    """The same parts, with `resolve` cached: LiGO trains its maps there."""
    resolved: list[Resolution] = []

    def resolve(donor: Donor) -> Resolution:
        if not resolved and parts.resolve:
            resolved.append(parts.resolve(donor))
        return resolved[0]

    return replace(parts, resolve=resolve)


def training_flops(cfg: Config) -> float:
    """FLOPs of a training: pictures x MACs x 2, three times for the student's two passes, once for a teacher."""
    spec = functional(cfg.family.module, cfg.student).spec
    passes = 6 * cfg.family.macs(cfg.student, spec)
    if cfg.teacher:
        teacher = open_classifier(cfg.teacher)
        passes += 2 * teacher.family.macs(teacher.cfg, teacher.model.spec)
    return float(cfg.steps * cfg.pictures * passes)


def gene_row(cfg: Config, folder: Path) -> dict[str, Any]:
    """Accuracy of a trained gene, its size, and the FLOPs of its training."""
    _, scores = last_scores(MetricsFile(folder / METRICS).lines())
    return {"top1": scores["top1"], "parameters": cost.count(cfg.student), "flops": training_flops(cfg)}


def teacher_row(gene: Config, trained: TeacherConfig | None, source: str) -> dict[str, Any]:
    """Accuracy and size of the teacher, and the FLOPs of its training. trained: its recipe, None if it was not trained
    here.
    """
    donor, mesh = open_classifier(source), start(gene.mesh)
    pre = preprocess_of(donor).pre
    score = scorer(donor.family, donor.cfg, held_out(gene, pre, labels_of(donor)), pre, mesh)
    parameters = donor.family.parameters(donor.model.spec)["total"]
    top1 = score(load_params(donor, mesh)).metrics["top1"]
    return {"top1": top1, "parameters": parameters, "flops": training_flops(trained) if trained else None}


def report(cfg: Comparison, results: dict[str, Any]) -> None:
    """Print a table: accuracy after 0, 1 and n epochs, TFLOP of tuning and of the gene, parameters stored."""
    table = Table(box=None, pad_edge=False)
    after = sorted({0, 1, cfg.epochs} & set(range(cfg.epochs + 1)))
    headers = ["", "depth", *(f"after {n}" for n in after), "TFLOP", "once before", "stored for all depths"]
    for header in headers:
        table.add_column(header, justify="right" if header else "left")
    teacher = results["teacher"]
    known = "unknown" if teacher["flops"] is None else _tera(teacher["flops"])
    empty = [""] * (len(after) - 1)
    table.add_row("teacher", "", *empty, _percent(teacher["top1"]), "", known, f"{teacher['parameters']:,}")
    for name in cfg.methods:
        rows = [results["arms"][f"{name}-{depth}"] for depth in cfg.depths]
        gene = results["genes"].get(ARMS[name].gene)
        stored = gene["parameters"] if gene else sum(row["parameters"] for row in rows)
        for row in rows:
            first = row is rows[0]
            gene_cost = _tera(gene["flops"]) if gene and first else ""
            accuracy = [_percent(row["top1"][n]) for n in after]
            size = f"{stored:,}" if first else ""
            table.add_row(name, str(row["depth"]), *accuracy, _tera(row["flops"]), gene_cost, size)
    console = Console()
    console.print("\naccuracy on held-out pictures, by epochs of training", soft_wrap=True)
    console.print(table)
    console.print(
        "TFLOP: pictures times operations. A gene is trained once for all depths, and its column includes the teacher's"
        " forward passes; the training of the teacher is in its row.",
        soft_wrap=True,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.2f}"


make_callable(__name__, "learngene.pretrained:compare")
