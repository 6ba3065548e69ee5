"""Turn checkpoints of others into ones that the steps read. Only tensors are read, never code.

    python tools/release.py model.ckpt runs/released    the paper's DPM-Solver and LDM networks: a run
    python tools/release.py vq-f4.ckpt runs/released    LDM's first stage: autoencoder.pt in it

Their parameters have other names, but their *order* is that of the modules here: going through both
side by side fills a network. What differs is stored differently: 1×1 convolutions of attention as
matrices (NCSN++) or over sequences (ADM), and q, k, v apart, interleaved, or head by head.
"""

import importlib
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
workshop = importlib.import_module("00_workshop")
unet = importlib.import_module("03_multistage_unet")
ldm = importlib.import_module("06_ldm")
BadInput = workshop.BadInput


def match_release(model, named):
    """Pair the release's parameters with a network's: its state dict.

    named: [(name, tensor)] in the release's order. Raises BadInput where they do not fit.
    """
    waiting, found = list(named)[::-1], {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
            continue
        apart = name.endswith("qkv") and waiting and 3 * len(waiting[-1][1]) == len(layer.weight)
        pairs = 3 if apart else 1
        taken = [waiting.pop() for _ in range(2 * pairs) if waiting]
        if len(taken) < 2 * pairs:
            raise BadInput(f"the checkpoint ends before {name}")
        weight, bias = [tensor for _, tensor in taken[::2]], [tensor for _, tensor in taken[1::2]]
        if isinstance(layer, nn.Conv2d) and weight[0].dim() == 2:
            weight = [matrix.T for matrix in weight]  # NCSN++ has (in, out)
        weight, bias = torch.cat(weight), torch.cat(bias)
        if name.endswith("qkv") and pairs == 1:  # head by head, or the three interleaved
            attention = model.get_submodule(name[:-4])
            first = getattr(attention, "heads", 1) if weight.dim() == 3 else len(bias) // 3
            weight, bias = (
                v.reshape(first, 3, -1).transpose(0, 1).reshape(v.shape) for v in (weight, bias)
            )
        weight = weight.reshape(*weight.shape, *[1] * (layer.weight.dim() - weight.dim()))
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor.shape != getattr(layer, kind).shape:
                raise BadInput(
                    f"{taken[0][0]} has shape {tuple(tensor.shape)}, "
                    f"where {name} has {tuple(getattr(layer, kind).shape)}"
                )
            found[f"{name}.{kind}"] = tensor.contiguous()
    if waiting:
        raise BadInput(f"the checkpoint has {waiting[-1][0]}, for which there is no place")
    return found


def release_parameters(saved, averaged=True):
    """List the network's parameters [(name, tensor)] in what a release checkpoint holds.

    The list is empty where it holds no multistage network.
    """
    saved = saved if isinstance(saved, dict) else {}
    state, shadow = saved.get("model", {}), saved.get("ema", {}).get("shadow_params")
    if "state_dict" in saved:  # LDM
        state, prefix = saved["state_dict"], "model.diffusion_model."
        mean = lambda name: "model_ema.diffusion_model" + name.replace(".", "")  # noqa: E731
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        shadow = [saved["state_dict"].get(mean(name), v) for name, v in state.items()]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if not any(name.startswith("de_modules.") for name in state):
        return []
    named = [(n, v) for n, v in state.items() if n != "sigmas"]  # a table, no parameter
    if averaged and shadow is not None:
        if len(shadow) != len(named):
            raise BadInput(f"{len(shadow)} averaged weights for {len(named)} parameters")
        named = [(name, mean) for (name, _), mean in zip(named, shadow, strict=True)]

    def place(entry):  # LDM lists the last layers of all decoders at the end
        part, k, *_ = (*entry[0].split("."), "")
        return (int(k), part == "outs") if part in ("de_modules", "outs") else (-1, False)

    return sorted(named, key=place)


def find_network(saved, averaged=True):
    """Find the network of NETWORKS that a release checkpoint fits: (its name, filled, in eval mode)."""
    named, reason = release_parameters(saved, averaged), "it lacks their entries"
    width = next((len(v) for _, v in named if v.dim() == 4), None)
    for name in [n for n, kind in unet.NETWORKS.items() if kind["encoder"] == width]:
        try:
            with torch.device("meta"):
                found = match_release(unet.build_network(name), named)
        except BadInput as error:
            reason = f"{name}: {error}"
            continue
        model = unet.build_network(name)
        model.load_state_dict(found)
        return name, model.eval()
    raise BadInput(f"this is none of the published networks ({reason})")


def from_release(state):
    """Build an autoencoder from the state dict of LDM's first stage.

    Raises BadInput for one with attention outside the middle, which LDM has at f = 8 and above.
    """
    tensors = {name.removeprefix("first_stage_model."): v for name, v in state.items()}
    if any(".attn." in name for name in tensors):
        raise BadInput("this first stage has attention at several resolutions: take VQ-f4 or KL-f4")
    width, channels = tensors["encoder.conv_in.weight"].shape[:2]
    widths = []
    while f"encoder.down.{len(widths)}.block.0.conv1.weight" in tensors:
        widths.append(len(tensors[f"encoder.down.{len(widths)}.block.0.conv1.weight"]))
    blocks = sum(name.startswith("encoder.down.0.") and "conv1.w" in name for name in tensors)
    vectors = tensors.get("quantize.embedding.weight")
    plan = dict(kind="kl" if vectors is None else "vq", channels=channels, width=width)
    plan.update(blocks=blocks, mults=[c // width for c in widths])
    plan.update(code=len(tensors["post_quant_conv.weight"]))
    plan.update(entries=None if vectors is None else len(vectors))

    parts = ("encoder.", "quant_conv.", "post_quant_conv.", "decoder.")
    named = [(n, v) for part in parts for n, v in tensors.items() if n.startswith(part)]

    def place(entry):  # the release lists the decoder's levels from the picture inwards
        part, what, k, *_ = (*entry[0].split("."), "", "")
        order = ["conv_in", "mid", "up", "norm_out", "conv_out"]
        rank = order.index(what) if part == "decoder" else 0
        return parts.index(f"{part}."), rank, -int(k) if (part, what) == ("decoder", "up") else 0

    model = ldm.Autoencoder(**plan)
    found = match_release(model, sorted(named, key=place))
    if model.kind == "vq":
        found.update({"codebook.vectors": vectors, "codebook.used": model.codebook.used})
    model.load_state_dict(found)
    return model


def read_tensors(path):
    """Read a checkpoint as plain tensors; LDM's name a class of Lightning that nobody needs."""
    stand_in = type("Inert", (), {}), "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    with torch.serialization.safe_globals([stand_in]):
        return torch.load(path, map_location="cpu", weights_only=True)


def convert(path, run):
    """Write what a release checkpoint holds into the folder of a run."""
    saved = read_tensors(path)
    if any("quant_conv" in name for name in saved.get("state_dict", {})):
        model = from_release(saved["state_dict"])
        content = dict(options=model.options, model=model.state_dict(), step=0, of=0)
        workshop.write_checkpoint(content, run, "autoencoder.pt")
    if release_parameters(saved):
        name, model = find_network(saved)
        kind = unet.NETWORKS[name]
        settings = dict(dataset="celeba" if kind.get("time") else "cifar10", network=name)
        settings.update(process=kind.get("time", "vp"), boundaries=list(kind["boundaries"]))
        step = saved.get("step", saved.get("global_step", 0))
        content = dict(settings=settings, ema=model.state_dict(), step=int(step))
        workshop.write_checkpoint(content, run)
        workshop.write_json(settings, Path(run) / "settings.json")


if __name__ == "__main__":
    convert(*sys.argv[1:3])
