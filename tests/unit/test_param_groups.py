"""Every trainable parameter is routed once, to the right rule, with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from distmuon import Blocks, Muon, build_param_groups, qkv_blocks
from distmuon.layout import read_spec
from distmuon.param_groups import Route, format_routes, route
from tests.harness import run_ranks


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width, bias=False)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.attn = Attention(width)


class Decoder(nn.Module):
    def __init__(self, vocabulary: int = 32, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)


class Bag(nn.Module):
    """A module with the given children and parameters and, if wanted, another class name."""

    def __init__(self, **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


def bag_class(name: str, *bases: type) -> type[Bag]:
    return type(name, (*bases, Bag), {})


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def routes_of(model: nn.Module, **options: Any) -> dict[str, Route]:
    return {each.fqn: each for each in route(model, **options)}


def the_route(**members: nn.Module | nn.Parameter) -> Route:
    """Route of the first parameter of a model that also has a hidden matrix after it."""
    return route(Bag(**members, hidden=nn.Linear(5, 7, bias=False)))[0]


# Kinds -------------------------------------------------------------------------------------------


def test_a_decoder_goes_where_it_should() -> None:
    found = {name: (r.algorithm, r.kind) for name, r in routes_of(Decoder(depth=1)).items()}
    assert found == {
        "embed_tokens.weight": ("adamw", "embedding"),
        "layers.0.norm.weight": ("adamw", "norm"),
        "layers.0.attn.qkv.weight": ("muon", "matrix"),
        "layers.0.attn.qkv.bias": ("adamw", "bias"),
        "layers.0.attn.o_proj.weight": ("muon", "matrix"),
        "norm.weight": ("adamw", "norm"),
        "norm.bias": ("adamw", "norm"),
        "lm_head.weight": ("adamw", "head"),
    }


@pytest.mark.parametrize(
    ("members", "kind", "reason"),
    [
        ({"table": nn.Embedding(9, 4)}, "embedding", "Embedding"),
        ({"table": nn.EmbeddingBag(9, 4)}, "embedding", "EmbeddingBag"),
        (
            {"table": type("WordTable", (nn.Embedding,), {})(9, 4)},
            "embedding",
            "WordTable",
        ),
        (
            {"table": bag_class("VocabParallelEmbedding")(weight=parameter(9, 4))},
            "embedding",
            "VocabParallelEmbedding",
        ),
        ({"pos_embed": parameter(1, 9, 4)}, "embedding", "pos_embed"),
        ({"wpe": parameter(9, 4)}, "embedding", "wpe"),
        ({"relative_position_bias_table": parameter(9, 4)}, "embedding", "table"),
        ({"patch_embed": nn.Linear(4, 6)}, "embedding", "patch_embed"),
        ({"tables": parameter(1, 9, 4)}, "embedding", "broadcast"),
        ({"lm_head": nn.Linear(4, 6)}, "head", "lm_head"),
        ({"lm_head": parameter(6, 4)}, "head", "lm_head"),
        ({"value_head": nn.Linear(4, 6)}, "head", "value_head"),
        ({"score": nn.Linear(4, 6)}, "head", "score"),
        ({"fc": nn.Linear(4, 6)}, "head", "fc"),
        ({"norm": nn.LayerNorm([4, 6])}, "norm", "LayerNorm"),
        ({"scale": bag_class("MyRMSNorm")(weight=parameter(4, 6))}, "norm", "MyRMSNorm"),
        ({"bn": nn.BatchNorm2d(4)}, "norm", "BatchNorm2d"),
        ({"gate_up_proj_bias": parameter(3, 8)}, "bias", "bias"),
        ({"temperature": nn.Parameter(torch.tensor(1.0))}, "vector", "0-D"),
        ({"sinks": parameter(4)}, "vector", "1-D"),
        ({"A_log": parameter(8, 4)}, "vector", "decay rates"),
        ({"conv": nn.Conv1d(4, 6, 3)}, "other", "convolution"),
        ({"conv": nn.Conv2d(4, 6, 3)}, "other", "convolution"),
        ({"conv": nn.ConvTranspose2d(4, 6, 3)}, "other", "convolution"),
        ({"kernel": parameter(2, 3, 4, 5)}, "other", "4-D"),
        ({"gate": nn.Linear(4, 1)}, "other", "one row or column"),
        ({"gate": nn.Linear(1, 4)}, "other", "one row or column"),
        ({"lora_A": nn.Linear(8, 4)}, "other", "LoRA"),
    ],
)
def test_goes_to_adamw(
    members: dict[str, nn.Module | nn.Parameter], kind: str, reason: str
) -> None:
    found = the_route(**members)
    assert (found.algorithm, found.kind) == ("adamw", kind)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("members", "kind", "reason"),
    [
        ({"up_proj": nn.Linear(4, 6)}, "matrix", "(Linear)"),
        ({"weight": parameter(4, 6)}, "matrix", "(Bag)"),
        ({"experts": parameter(3, 4, 6)}, "stack", "stack of 3 matrices"),
        ({"attention": nn.MultiheadAttention(4, 2)}, "matrix", "fused"),
        ({"rnn": nn.LSTM(4, 6)}, "matrix", "fused"),
        # Words that only look like embeddings, heads or norms.
        ({"gate_proj": nn.Linear(4, 6)}, "matrix", "Linear"),
        ({"out_proj": nn.Linear(4, 6)}, "matrix", "Linear"),
        ({"member": nn.Linear(4, 6)}, "matrix", "Linear"),
        ({"headroom": nn.Linear(4, 6)}, "matrix", "Linear"),
        ({"block": Bag(output=nn.Linear(4, 6))}, "matrix", "Linear"),
        ({"block": bag_class("NormalizedBlock")(weight=parameter(4, 6))}, "matrix", "Normalized"),
    ],
)
def test_goes_to_muon(members: dict[str, nn.Module | nn.Parameter], kind: str, reason: str) -> None:
    found = the_route(**members)
    assert (found.algorithm, found.kind) == ("muon", kind)
    assert reason in found.reason


def test_a_router_stays_with_muon_and_says_so() -> None:
    moe = Bag(
        router=nn.Linear(8, 4, bias=False),
        experts=nn.ModuleList([nn.Linear(8, 6, bias=False) for _ in range(4)]),
    )
    found = routes_of(Bag(layers=nn.ModuleList([Bag(mlp=moe)])))
    assert "router" in found["layers.0.mlp.router.weight"].reason
    assert {each.algorithm for each in found.values()} == {"muon"}


def test_peft_names_leave_only_adapters_and_none_of_them_to_muon() -> None:
    base = nn.Linear(8, 8, bias=False).requires_grad_(False)
    adapted = Bag(
        base_layer=base,
        lora_A=nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)}),
        lora_B=nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)}),
    )
    found = routes_of(Bag(q_proj=adapted, lm_head=adapted))
    assert [(each.algorithm, "LoRA" in each.reason) for each in found.values()] == [
        ("frozen", False),
        ("adamw", True),
        ("adamw", True),
    ]


def test_weight_norm_keeps_an_embedding_an_embedding() -> None:
    model = Decoder(depth=1)
    nn.utils.parametrizations.weight_norm(model.embed_tokens)
    found = routes_of(model)
    assert found["embed_tokens.parametrizations.weight.original1"].kind == "embedding"


# Heads -------------------------------------------------------------------------------------------


def test_only_the_last_matrix_of_a_classifier_is_the_head() -> None:
    classifier = Bag(dense=nn.Linear(8, 8), out_proj=nn.Linear(8, 3))
    found = routes_of(Bag(classifier=classifier))
    assert found["classifier.dense.weight"].algorithm == "muon"
    assert found["classifier.out_proj.weight"].kind == "head"


def test_attention_heads_inside_layers_are_no_output_heads() -> None:
    heads = nn.ModuleList([Bag(key=nn.Linear(8, 4), value=nn.Linear(8, 4)) for _ in range(2)])
    found = routes_of(Bag(blocks=nn.ModuleList([Bag(heads=heads)])))
    assert found["blocks.0.heads.1.value.weight"].algorithm == "muon"


def test_a_head_without_a_name_is_found_by_the_vocabulary() -> None:
    model = Bag(tok=nn.Embedding(32, 8), mix=nn.Linear(8, 16), last=nn.Linear(16, 32, bias=False))
    found = routes_of(model)
    assert found["last.weight"].kind == "head"
    assert "each row of tok.weight" in found["last.weight"].reason
    assert found["mix.weight"].algorithm == "muon"


def test_a_hidden_layer_as_wide_as_a_position_table_is_no_head() -> None:
    positions = nn.Embedding(32, 8)
    not_last = Bag(pos=positions, up=nn.Linear(8, 32), down=nn.Linear(32, 8))
    assert routes_of(not_last)["up.weight"].algorithm == "muon"
    not_alone = Bag(pos=positions, first=nn.Linear(8, 32), second=nn.Linear(32, 32))
    assert routes_of(not_alone)["second.weight"].algorithm == "muon"


class Declaring(nn.Module):
    """As Hugging Face's models: asked, it tells its own embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Linear(32, 8, bias=False)
        self.hidden = nn.Linear(8, 8, bias=False)
        self.project = nn.Linear(8, 30, bias=False)
        self.after = nn.Linear(8, 8, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.lookup

    def get_output_embeddings(self) -> nn.Module:
        return self.project


class Undecided(Declaring):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError

    def get_output_embeddings(self) -> None:  # type: ignore[override]
        return None


def test_the_models_own_word_counts() -> None:
    kinds = [each.kind for each in route(Declaring())]
    assert kinds == ["embedding", "matrix", "head", "matrix"]
    assert {each.kind for each in route(Undecided())} == {"matrix"}


def test_a_part_declared_as_both_is_an_embedding() -> None:
    model = Declaring()
    model.project = model.lookup
    assert route(model)[0].kind == "embedding"


# Sharing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_tied_weight_is_an_embedding_whichever_comes_first(first: str) -> None:
    embedding, other = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
    other.weight = embedding.weight
    parts = {"tok": embedding, "last": other}
    if first == "head":
        parts = dict(reversed(parts.items()))
    model = Bag(**parts, hidden=nn.Linear(8, 8, bias=False))
    tied, hidden = route(model)
    assert (tied.algorithm, tied.kind) == ("adamw", "embedding")
    names = ["tok.weight", "last.weight"]
    assert tied.fqn in names
    names.remove(tied.fqn)
    assert tied.reason.endswith(f"shared with {names[0]}")
    assert hidden.algorithm == "muon"


def test_a_hidden_matrix_tied_to_a_head_is_a_head() -> None:
    hidden, head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    head.weight = hidden.weight
    (found,) = route(Bag(hidden=hidden, lm_head=head))
    assert (found.algorithm, found.kind) == ("adamw", "head")


def test_a_shared_block_is_routed_once() -> None:
    block = nn.Linear(8, 8)
    model = Bag(layers=nn.ModuleList([block, block]))
    weight, bias = route(model)
    assert weight.fqn == "layers.0.weight"
    assert "shared with layers.1.weight" in weight.reason
    assert bias.fqn == "layers.0.bias"
    groups = build_param_groups(model)
    assert sum(len(group["params"]) for group in groups) == 2


def test_one_module_with_two_names_for_a_parameter() -> None:
    shared = parameter(4, 6)
    (found,) = route(Bag(up=shared, wpe=shared))
    assert (found.fqn, found.kind) == ("up", "embedding")
    assert found.reason.endswith("shared with wpe")


# Names -------------------------------------------------------------------------------------------


def _names_under_ddp() -> tuple[list[str], list[str]]:
    model = Decoder(depth=1)
    names = [each.fqn for each in route(model)]
    return names, [each.fqn for each in route(DistributedDataParallel(model))]


def _compiled(model: nn.Module) -> nn.Module:
    module = torch.compile(model)
    assert isinstance(module, nn.Module)
    return module


def _checkpointed(model: nn.Module) -> nn.Module:
    assert isinstance(model, Decoder)
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer)
    return model


def test_ddp_does_not_change_names() -> None:
    ((plain, wrapped),) = run_ranks(1, _names_under_ddp)
    assert wrapped == plain


@pytest.mark.parametrize("wrap", [_compiled, _checkpointed, nn.DataParallel])
def test_wrappers_do_not_change_routes(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = route(Decoder())
    assert route(wrap(Decoder())) == plain


def test_a_models_own_child_called_module_keeps_its_name() -> None:
    assert [each.fqn for each in route(Bag(module=nn.Linear(4, 4, bias=False)))] == [
        "module.weight"
    ]


def test_two_parameters_of_one_name_are_refused() -> None:
    model = Bag(weight=parameter(4, 4), _orig_mod=nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match="Two parameters are called 'weight'"):
        route(model)


# Groups ------------------------------------------------------------------------------------------


def test_groups_are_split_by_algorithm_and_decay() -> None:
    groups = build_param_groups(Decoder(depth=1), weight_decay=0.05)
    shown = [(g["algorithm"], g["weight_decay"], [n for n, _ in g["params"]]) for g in groups]
    assert shown == [
        ("muon", 0.05, ["layers.0.attn.qkv.weight", "layers.0.attn.o_proj.weight"]),
        ("adamw", 0.05, ["embed_tokens.weight", "lm_head.weight"]),
        (
            "adamw",
            0.0,
            ["layers.0.norm.weight", "layers.0.attn.qkv.bias", "norm.weight", "norm.bias"],
        ),
    ]
    for group in groups:
        assert len(group["reasons"]) == len(group["params"])
        assert all(group["reasons"])


def test_decay_all_decays_norms_and_biases_too() -> None:
    groups = build_param_groups(Decoder(), decay="all")
    assert [(g["algorithm"], g["weight_decay"]) for g in groups] == [("muon", 0.1), ("adamw", 0.1)]


def test_vectors_are_not_decayed() -> None:
    vector, matrix = build_param_groups(Bag(gain=parameter(4), up=nn.Linear(4, 6, bias=False)))[
        ::-1
    ]
    assert [name for name, _ in vector["params"]] == ["gain"]
    assert (vector["weight_decay"], matrix["weight_decay"]) == (0.0, 0.1)


def test_no_decay_leaves_two_groups() -> None:
    groups = build_param_groups(Decoder(), weight_decay=0)
    assert [(g["algorithm"], g["weight_decay"]) for g in groups] == [("muon", 0.0), ("adamw", 0.0)]


def test_muon_takes_the_groups() -> None:
    model = Decoder(depth=1)
    optimizer = Muon(build_param_groups(model), lr=1e-3)
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()}


def test_frozen_parameters_are_listed_and_left_out() -> None:
    model = Decoder(depth=1)
    model.layers.requires_grad_(False)
    model.layers[0].attn.o_proj.weight.requires_grad_(True)
    found = routes_of(model)
    assert found["layers.0.attn.qkv.weight"].algorithm == "frozen"
    names = [name for group in build_param_groups(model) for name, _ in group["params"]]
    assert [name for name in names if name.startswith("layers")] == ["layers.0.attn.o_proj.weight"]


@hypothesis.given(data=st.data())
def test_every_trainable_parameter_is_in_exactly_one_group(data: st.DataObject) -> None:
    makers: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(4, 4),
        lambda: nn.Linear(4, 1, bias=False),
        lambda: nn.Embedding(4, 4),
        lambda: nn.LayerNorm(4),
        lambda: nn.Conv2d(2, 2, 3),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: Bag(experts=parameter(2, 3, 4), router=nn.Linear(4, 2)),
        lambda: Block(4),
    ]
    names = st.sampled_from(["lm_head", "wte", "layers", "classifier", "x", "lora_A", "norm"])
    parts = data.draw(st.lists(st.tuples(names, st.sampled_from(makers)), min_size=1, max_size=6))
    modules = [(name, make()) for name, make in parts]
    if data.draw(st.booleans()):
        modules.append(("again", modules[0][1]))
    model = nn.Module()
    for index, (name, module) in enumerate(modules):
        setattr(model, f"{name}_{index}" if data.draw(st.booleans()) else name, module)
    for each in model.parameters():
        each.requires_grad_(data.draw(st.booleans()))
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    hypothesis.assume(trained)

    groups = build_param_groups(model)
    grouped = [id(p) for group in groups for _, p in group["params"]]
    assert sorted(grouped) == sorted(trained)
    assert len({(g["algorithm"], g["weight_decay"]) for g in groups}) == len(groups)
    for group in groups:
        for name, p in group["params"]:
            assert model.get_parameter(name) is p
            if group["algorithm"] == "muon":
                assert p.dim() in (2, 3)
                assert min(p.shape[-2:]) > 1


# Overrides ---------------------------------------------------------------------------------------


def test_overrides_win_and_the_last_one_counts() -> None:
    found = routes_of(
        Decoder(depth=2),
        overrides={
            "*.o_proj.weight": "adamw",
            "layers.1.attn.o_proj.*": "muon",
            "lm_head.*": "muon",
        },
    )
    assert found["layers.0.attn.o_proj.weight"].algorithm == "adamw"
    assert found["layers.1.attn.o_proj.weight"].algorithm == "muon"
    assert found["layers.1.attn.o_proj.weight"].reason == "override 'layers.1.attn.o_proj.*'"
    assert found["lm_head.weight"].algorithm == "muon"


def test_an_override_reaches_a_tied_weight_by_any_of_its_names() -> None:
    model = Decoder()
    model.lm_head.weight = model.embed_tokens.weight
    found = routes_of(model, overrides={"lm_head.weight": "muon"})
    assert found["embed_tokens.weight"].algorithm == "muon"


def test_an_override_does_not_thaw_what_is_frozen() -> None:
    model = Decoder(depth=2)
    model.layers[0].requires_grad_(False)
    found = routes_of(model, overrides={"*.o_proj.weight": "adamw"})
    assert found["layers.0.attn.o_proj.weight"].algorithm == "frozen"
    assert found["layers.1.attn.o_proj.weight"].algorithm == "adamw"


def test_an_override_does_not_change_decay() -> None:
    groups = build_param_groups(Decoder(depth=1), overrides={"lm_head.weight": "muon"})
    assert "lm_head.weight" in dict(groups[0]["params"])
    assert groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers.0.attn.oproj.weight": "adamw"}, r"matches no .* layers\.0\.attn\.o_proj\.weight"),
        ({"zzz": "adamw"}, "matches no parameter"),
        ({"*.bias": "muon"}, r"layers\.0\.attn\.qkv\.bias to Muon, but its shape is \[24\]"),
        ({"lm_head.weight": "sgd"}, '\'sgd\'. Must be "muon" or "adamw"'),
    ],
)
def test_bad_overrides_are_refused(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_param_groups(Decoder(), overrides=overrides)


def test_depthwise_kernels_are_refused_even_where_asked_for() -> None:
    model = Bag(conv=nn.Conv1d(6, 6, 3, groups=6), hidden=nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"conv\.weight to Muon.*one row for each channel"):
        route(model, overrides={"conv.weight": "muon"})


# Structure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "algorithm", "reason", "blocks"),
    [
        (nn.Conv2d(8, 6, 3), "muon", "convolution, flattened to [6, 72]", None),
        (nn.Conv1d(8, 6, 3), "muon", "convolution, flattened to [6, 24]", None),
        (nn.Conv2d(8, 6, 3, groups=2), "muon", "flattened to 2 x [3, 36]", Blocks(2)),
        (nn.Conv1d(8, 8, 3, groups=8), "adamw", "depthwise", None),
        (nn.Conv1d(8, 16, 3, groups=8), "adamw", "depthwise", None),
        (nn.Conv2d(3, 8, 7), "adamw", "reads the input (3 channels)", None),
        (nn.Conv2d(8, 1, 1), "adamw", "one row or column", None),
        (nn.ConvTranspose2d(8, 6, 3), "adamw", "transposed", None),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_kernels_are_flattened_unless_they_are_no_matrices(
    conv: nn.Module, algorithm: str, reason: str, blocks: Blocks | None
) -> None:
    found = the_route(conv=conv)
    assert (found.algorithm, found.axes, found.blocks) == (
        algorithm,
        "conv" if algorithm == "muon" else "out_in",
        blocks,
    )
    assert reason in found.reason
    model = Bag(conv=conv, hidden=nn.Linear(8, 8))
    Muon(build_param_groups(model))


def test_a_patch_embedding_is_an_embedding_and_an_override_a_kernel() -> None:
    model = Bag(patch_embed=Bag(proj=nn.Conv2d(8, 6, 2)), hidden=nn.Linear(8, 8, bias=False))
    assert route(model)[0].kind == "embedding"
    asked = route(model, overrides={"patch_embed.proj.weight": "muon"})[0]
    assert (asked.algorithm, asked.axes) == ("muon", "conv")


def test_matrices_that_are_cut_alike_share_a_group() -> None:
    model = Decoder(depth=2)
    groups = build_param_groups(model, blocks={"*.qkv.weight": 3})
    cut, whole = (group for group in groups if group["algorithm"] == "muon")
    if "blocks" not in cut:
        cut, whole = whole, cut
    assert [name for name, _ in cut["params"]] == [f"layers.{i}.attn.qkv.weight" for i in (0, 1)]
    assert cut["blocks"] == Blocks(3)
    assert cut["reasons"][0] == "hidden matrix, in blocks of (8, 8, 8) rows"
    assert "blocks" not in whole
    optimizer = Muon(groups)
    assert optimizer.report().matrices == 2 * 3 + 2
    assert optimizer.param_groups[0]["blocks"] == (3, "rows", 1)


def test_transposed_weights_are_found_by_their_class_or_said_by_pattern() -> None:
    model = Bag(
        c_attn=bag_class("Conv1D")(weight=parameter(8, 24)),
        experts=bag_class("GptOssExperts")(gate_up_proj=parameter(2, 8, 12)),
        other=parameter(8, 4),
    )
    found = routes_of(
        model, axes={"other": "in_out"}, blocks={"c_attn.*": qkv_blocks(4, 2, dim="columns")}
    )
    assert {each.axes for each in found.values()} == {"in_out"}
    assert "stored [in, out]" in found["experts.gate_up_proj"].reason
    assert found["c_attn.weight"].blocks == Blocks((8, 8, 8), "columns")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": {"*.qkv.weight": 5}}, r"blocks .*layers\.0\.attn\.qkv\.weight .* 24 rows"),
        ({"blocks": {"*.zzz": 2}}, r"blocks '\*\.zzz' matches no parameter"),
        ({"blocks": {"lm_head.weight": 2}}, r"lm_head\.weight, which goes to AdamW \(output head"),
        ({"axes": {"layers.0.attn.qkv.weight": "columns"}}, "Invalid axes='columns'"),
    ],
)
def test_structures_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_param_groups(Decoder(), **options)


def test_mla_projections_are_matrices_and_can_be_cut() -> None:
    """DeepSeek's names: latent and rope rows of kv_a, keys and values of kv_b by head."""
    heads, nope, rope, value, latent = 4, 6, 2, 5, 8
    attention = Bag(
        q_a_proj=nn.Linear(32, 12, bias=False),
        q_b_proj=nn.Linear(12, heads * (nope + rope), bias=False),
        kv_a_proj_with_mqa=nn.Linear(32, latent + rope, bias=False),
        kv_b_proj=nn.Linear(latent, heads * (nope + value), bias=False),
        o_proj=nn.Linear(heads * value, 32, bias=False),
    )
    found = routes_of(
        Bag(layers=nn.ModuleList([attention])),
        blocks={
            "*.q_b_proj.weight": Blocks((nope, rope), repeats=heads),
            "*.kv_a_proj_with_mqa.weight": (latent, rope),
            "*.kv_b_proj.weight": Blocks((nope, value), repeats=heads),
        },
    )
    assert {each.algorithm for each in found.values()} == {"muon"}
    shapes = {
        name.split(".")[2]: read_spec(name, r.shape, {"blocks": r.blocks}).orthogonalized
        for name, r in found.items()
    }
    assert shapes == {
        "q_a_proj": ((12, 32),),
        "q_b_proj": ((24, 12), (8, 12)),
        "kv_a_proj_with_mqa": ((8, 32), (2, 32)),
        "kv_b_proj": ((24, 8), (20, 8)),
        "o_proj": ((32, 20),),
    }


def test_an_override_of_frozen_parameters_only_is_refused() -> None:
    model = Decoder()
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"matches only frozen parameters, lm_head\.weight"):
        route(model, overrides={"lm_head.*": "muon"})


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [[parameter(4, 4)], {"w": parameter(4, 4)}, None, Decoder])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"Must be a torch\.nn\.Module"):
        build_param_groups(model)


@pytest.mark.parametrize("model", [nn.ReLU(), Decoder().requires_grad_(False)])
def test_nothing_to_train_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="none is trainable"):
        build_param_groups(model)


def test_a_lazy_parameter_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer\.weight is uninitialized"):
        build_param_groups(Bag(layer=nn.LazyLinear(4)))


def test_an_empty_parameter_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer\.weight has shape \[0, 4\], no elements"):
        build_param_groups(Bag(layer=Bag(weight=parameter(0, 4)), hidden=nn.Linear(4, 4)))


def _route_a_dtensor() -> str:
    mesh = init_device_mesh("cpu", (1,))
    model = Decoder(depth=1)
    sharded = distribute_tensor(model.layers[0].attn.o_proj.weight.detach(), mesh)
    model.layers[0].attn.o_proj.weight = nn.Parameter(sharded)
    try:
        route(model)
    except TypeError as error:
        return str(error)
    return "no error"


def test_a_dtensor_is_refused_by_name() -> None:
    (message,) = run_ranks(1, _route_a_dtensor)
    assert message.startswith("layers.0.attn.o_proj.weight is a DTensor")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_decay": -0.1}, ValueError, r"Invalid weight_decay=-0\.1"),
        ({"weight_decay": math.nan}, ValueError, "Invalid weight_decay=nan"),
        ({"weight_decay": "0.1"}, TypeError, "Invalid weight_decay='0.1'"),
        ({"weight_decay": True}, TypeError, "Invalid weight_decay=True"),
        ({"decay": "norms"}, ValueError, 'Must be "weights" or "all"'),
        ({"overrides": ["lm_head.*"]}, TypeError, "Invalid overrides"),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_param_groups(Decoder(), **options)


def test_routing_touches_nothing() -> None:
    model = Decoder()
    before = {name: p.clone() for name, p in model.named_parameters()}
    first = route(model)
    assert route(model) == first
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0)


# The table ---------------------------------------------------------------------------------------


def test_the_table_folds_equal_layers() -> None:
    lines = format_routes(route(Decoder(depth=12))).splitlines()
    assert any(line.startswith("layers.*.attn.o_proj.weight x 12 ") for line in lines)
    assert not any("layers.0" in line for line in lines)
    assert len([line for line in lines if "o_proj" in line]) == 1
    assert lines[-1].endswith("elements")


def test_the_table_keeps_unequal_layers_apart() -> None:
    model = Decoder(depth=3)
    model.layers[1].requires_grad_(False)
    lines = [line for line in format_routes(route(model)).splitlines() if "o_proj" in line]
    assert [line.split()[0] for line in lines] == [
        "layers.*.attn.o_proj.weight",
        "layers.1.attn.o_proj.weight",
    ]


def test_the_table_counts_every_element() -> None:
    model = Decoder(depth=2)
    totals = [
        line for line in format_routes(route(model)).splitlines() if line.endswith("elements")
    ]
    counts = [int(line.split()[1].replace(",", "")) for line in totals]
    assert sum(counts) == sum(p.numel() for p in model.parameters())
