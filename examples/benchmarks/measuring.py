"""What benchmarks share: the machine that they report, peaks of memory, and runs that take turns."""

import platform
import resource
import statistics
import time

import diffusers
import torch

import diffusers_dtr


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def environment(device="cpu"):
    """The part of a report that says what the numbers are of."""
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "machine": torch.cuda.get_device_name(device) if _is_cuda(device) else cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "diffusers_dtr": diffusers_dtr.__version__,
    }


def peak_bytes(device="cpu"):
    """The most that CUDA's allocator has held on a device, or of resident memory that this process had."""
    if _is_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def seconds_by_turns(runs, repeats, warmup, device="cpu", clock=time.perf_counter):
    """Seconds of every timed run, by name. The runs take turns, and the one that goes first alternates."""
    seconds = {name: [] for name in runs}
    for repeat in range(warmup + repeats):
        for name in runs if repeat % 2 == 0 else reversed(runs):
            synchronise(device)
            start = clock()
            runs[name]()
            synchronise(device)
            if repeat >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def compare(rounds):
    """Medians of runs over the turns of all rounds, and the ratios of each to the last: of medians, and by round.

    What of a ratio does not go away with more turns is where the models happen to lie in memory: a round has new ones.
    """
    *others, base = rounds[0]
    medians = {name: statistics.median([each for turns in rounds for each in turns[name]]) for name in rounds[0]}
    ratios = {}
    for name in others:
        single = [statistics.median(turns[name]) / statistics.median(turns[base]) for turns in rounds]
        found = {"of_medians": medians[name] / medians[base], "min": min(single), "max": max(single)}
        ratios[name] = {key: round(value, 4) for key, value in found.items()}
    rounded = {name: round(value, 6) for name, value in medians.items()}
    turns = sum(len(each[base]) for each in rounds)
    return {"median_seconds": rounded, "base": base, "ratios": ratios, "rounds": len(rounds), "turns": turns}


def synchronise(device):
    """Wait for what a GPU was told to do."""
    if _is_cuda(device):
        torch.cuda.synchronize(device)


def fill_weights(model):
    """Random weights, because zeros of the initialisation would leave most gradients at zero."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)


def _is_cuda(device):
    return torch.device(device).type == "cuda"
