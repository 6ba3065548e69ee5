"""Turn a checkpoint of the paper's authors, or LDM's first stage, into files that the steps read.

    python tools/release.py checkpoint_9.pth runs/released
    python 05_sample_eval.py --name released

Only tensors are read, never code. EDM's .pkl files hold code: where you trust one, save its tensors
in EDM's repository, torch.save({"ema": pickle.load(open(FILE, "rb"))["ema"].state_dict()}, "x.pt").
"""

import argparse
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
    """Pair parameters [(name, tensor)] in the release's order with a network's: its state dict.

    The *order* is that of the modules here. Stored differently are 1×1 convolutions of attention,
    as matrices (NCSN++) or over sequences (ADM), and q, k, v, apart, interleaved or head by head.
    """
    waiting, found = list(named), {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
            continue
        apart = name.endswith("qkv") and waiting and 3 * len(waiting[0][1]) == len(layer.weight)
        n = 6 if apart else 2  # weight and bias of each
        taken, waiting = waiting[:n], waiting[n:]
        if len(taken) < n:
            raise BadInput(f"the checkpoint ends before {name}")
        matrices = isinstance(layer, nn.Conv2d) and taken[0][1].dim() == 2  # NCSN++: (in, out)
        weight = torch.cat([tensor.T if matrices else tensor for _, tensor in taken[::2]])
        bias = torch.cat([tensor for _, tensor in taken[1::2]])
        if name.endswith("qkv") and not apart:  # head by head, or the three interleaved
            heads = getattr(model.get_submodule(name[:-4]), "heads", 1)
            n = heads if weight.dim() == 3 else len(bias) // 3
            weight = weight.reshape(n, 3, -1).transpose(0, 1).reshape(weight.shape)
            bias = bias.reshape(n, 3, -1).transpose(0, 1).reshape(bias.shape)
        weight = weight.reshape(*weight.shape, *[1] * (layer.weight.dim() - weight.dim()))
        for kind, tensor in (("weight", weight), ("bias", bias)):
            theirs, ours = tuple(tensor.shape), tuple(getattr(layer, kind).shape)
            if theirs != ours:
                raise BadInput(f"{taken[0][0]} has shape {theirs}, where {name} has {ours}")
            found[f"{name}.{kind}"] = tensor.contiguous()
    if waiting:
        raise BadInput(f"the checkpoint has {waiting[0][0]}, for which there is no place")
    return found


def clean_names(state):
    """Take torch.compile's and DistributedDataParallel's prefixes off the names of tensors."""
    split = {name: name.split(".") for name, tensor in state.items() if torch.is_tensor(tensor)}
    parts = {n: [p for p in split[n] if p not in ("_orig_mod", "module")] for n in split}
    return {".".join(parts[name]): state[name] for name in parts}


def release_parameters(saved):
    """List a network's averaged parameters [(name, tensor)] in the order of the modules here.

    DPM-Solver's file has "model" and, in "ema", a list of averages; EDM's tensors are a state dict,
    "ema"; LDM's "state_dict" has both. Raw weights are taken only where there is no average at all,
    which is said. The list is empty where there is no multistage network.
    """
    state, means = clean_names(saved.get("model", {})), None
    if "state_dict" in saved:
        every, prefix = clean_names(saved["state_dict"]), "model.diffusion_model."
        state = {n.removeprefix(prefix): v for n, v in every.items() if n.startswith(prefix)}
        glued = ["model_ema.diffusion_model" + name.replace(".", "") for name in state]
        means = [every[name] for name in glued if name in every] or None
    elif "shadow_params" in saved.get("ema", {}):
        means = saved["ema"]["shadow_params"]
    elif "ema" in saved:
        state = clean_names(saved["ema"])
    tables = ("sigmas", "resample_filter")  # are no parameters
    state = {n.removeprefix("model."): v for n, v in state.items() if not n.endswith(tables)}
    if not any(name.startswith(("de_modules.", "decs.")) for name in state):
        return []
    if means is not None and len(means) != len(state):
        raise BadInput(f"{len(means)} averaged weights for {len(state)} parameters")
    if means is None and "ema" not in saved:
        print("there are no averaged weights: taking the raw ones")
    state = state if means is None else dict(zip(state, means, strict=True))

    def place(entry):  # LDM lists the last layers of all decoders at the end
        part, k, *_ = (*entry[0].split("."), "")
        return (int(k), part == "outs") if part in ("de_modules", "decs", "outs") else (-1, False)

    return sorted(state.items(), key=place)


def find_network(named):
    """Find the entry of NETWORKS that a release's parameters fit: (its name, its state dict)."""
    width = next((len(tensor) for _, tensor in named if tensor.dim() == 4), None)
    reason = f"none has an encoder of {width} channels"
    for name in [n for n, kind in unet.NETWORKS.items() if kind["encoder"] == width]:
        try:
            with torch.device("meta"):
                model = unet.build_network(name)
            return name, match_release(model, named)
        except BadInput as error:
            reason = f"{name}: {error}"
    raise BadInput(f"this is none of the published networks ({reason})")


def build_first_stage(tensors):
    """Build an autoencoder from {name: tensor} of LDM's first stage, VQ-f4 or KL-f4."""
    width, channels = tensors["encoder.conv_in.weight"].shape[:2]
    first = [name for name in tensors if name.startswith("encoder.down.") and "conv1.w" in name]
    mults = [len(tensors[name]) // width for name in first if ".block.0." in name]
    blocks = len(first) // len(mults)
    vectors, code = tensors.get("quantize.embedding.weight"), len(tensors["post_quant_conv.weight"])
    kind, entries = ("kl", None) if vectors is None else ("vq", len(vectors))
    plan = dict(channels=channels, code=code, width=width, blocks=blocks, entries=entries)
    model = ldm.Autoencoder(kind, mults=mults, **plan)
    parts, order = "encoder quant_conv post_quant_conv decoder", "conv_in mid up norm_out conv_out"
    parts, order = parts.split(), order.split()

    def place(entry):  # the release lists the decoder's levels from the picture inwards
        part, what, k, *_ = (*entry[0].split("."), "", "")
        rank = order.index(what) if part == "decoder" else 0
        return parts.index(part), rank, -int(k) if (part, what) == ("decoder", "up") else 0

    named = [(name, tensor) for name, tensor in tensors.items() if name.split(".")[0] in parts]
    found = match_release(model, sorted(named, key=place))
    if vectors is not None:
        found["codebook.vectors"] = vectors
    model.load_state_dict(found)
    return model


def convert(path, run, dataset=""):
    """Write what a checkpoint holds, a network, a first stage or both, into a run: the files.

    dataset: what the network was trained on; empty: celeba for LDM's, cifar10 for others.
    Raises BadInput where there is neither, or where the run has such a file already.
    """
    unused = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"  # LDM's files name it
    if not Path(path).is_file():
        raise BadInput(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([(type("Unused", (), {}), unused)]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file fails in many ways
        raise BadInput(f"{path} is damaged, or holds more than tensors: see --help") from error
    saved, files = saved if isinstance(saved, dict) else {}, {}
    state = clean_names(saved.get("state_dict", {}))
    state = {name.removeprefix("first_stage_model."): v for name, v in state.items()}
    if any(name.startswith("post_quant_conv.") for name in state):
        model = build_first_stage(state)
        content = dict(options=model.options, model=model.state_dict(), step=0, of=0)
        files["autoencoder.pt"] = content
    if named := release_parameters(saved):
        network, weights = find_network(named)
        time, cuts = (unet.NETWORKS[network].get(key) for key in ("time", "boundaries"))
        if time == "edm" and len(cuts) == 2:
            cuts = (2.5103, 7.6577)  # paper: 0.442 and 0.6308, which is 2.511 and 7.404
        settings = dict(network=network, process=time or "vp", boundaries=list(cuts))
        settings["dataset"] = dataset or ("celeba" if time == "ldm" else "cifar10")
        settings |= {"scale": 1.0} if time == "ldm" else {}  # its latents are drawn as they are
        step = int(saved.get("step", saved.get("global_step", 0)))
        files["checkpoint.pt"] = dict(settings=settings, ema=weights, step=step)
    if not files:
        raise BadInput(f"{path} holds neither a network of the paper nor a first stage of LDM")
    if there := [name for name in files if (Path(run) / name).exists()]:
        raise BadInput(f"{run} has {there[0]} already: give another folder")
    for name, content in files.items():
        workshop.write_checkpoint(content, run, name)
    return [str(Path(run) / name) for name in files]


if __name__ == "__main__":
    sys.excepthook = workshop.report_bad_input
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", help="file of the release or of LDM, such as model.ckpt")
    parser.add_argument("run", help="folder to write, such as runs/released")
    parser.add_argument("--dataset", default="", help="of the network: celeba, where EDM's is")
    given = parser.parse_args()
    print("wrote", *convert(given.checkpoint, given.run, given.dataset))
