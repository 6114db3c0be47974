"""Scores as the command line tells them."""

from __future__ import annotations


def accuracy_lines(scored: dict | None) -> list[str]:
    """Accuracies of answers, and metrics of generated text; none without scores."""
    if scored is None:
        return []
    shown = ", ".join(f"{k} {scored[k]:.1%}" for k in ("open", "closed", "global") if scored[k] is not None)
    lines = [f"accuracy on {scored['n']} questions: {shown} (most frequent answer: {scored['majority']:.1%})"]
    if scored["closed"] is not None:
        always, verdict = scored["always_no_closed"], "beats" if scored["closed"] > scored["always_no_closed"] else "does NOT beat"
        lines.append(f"on closed questions it {verdict} always answering 'no' ({always:.1%})")
    found = scored.get("metrics", {})
    means = {name: v if name == "tokens" else v.get("f1", v.get("score")) for name, v in found.items() if name != "missing"}
    text = [f"{v:.1f} tokens" if name == "tokens" else f"{name} {v:.3f}" for name, v in means.items()]
    lines += [f"text: {', '.join(text)}"] if text else []
    asked = {name: reason for name, reason in found.get("missing", {}).items() if not reason.startswith("no model folder")}
    return lines + [f"no {name}: {reason}" for name, reason in asked.items()]


def mmlu_lines(scored: dict | None) -> list[str]:
    """Of MMLU, by category and against the base; none without scores."""
    if scored is None:
        return []
    lines = [f"MMLU, {scored['n_tasks']} tasks, {scored['shots']} examples a prompt: mean of the tasks {scored['task_mean']:.1%}"]
    lines += [f"{name:>16}: {accuracy:.1%}" for name, accuracy in scored["categories"].items()]
    if "base" in scored:
        told = f"{scored['wins']} tasks won, {scored['ties']} tied, {scored['losses']} lost"
        lines.append(f"without the adapter {scored['base']['task_mean']:.1%}: {scored['change']:+.1%}; {told}")
    return lines


def ranks_lines(found: dict | None) -> list[str]:
    """An estimate's figures of several ranks."""
    if found is None:
        return []
    lines = [f"each of {found['world']} ranks on {found['nodes']} nodes; a step of {found['batch_size']} samples:"]
    lines += [f"{name.replace('_', ' '):>24} {value / 1e9:>10.4f} GB" for name, value in found.items() if "bytes" in name]
    return lines + [f"{name.replace('_', ' '):>24} {value * 1e3:>10.3f} ms" for name, value in found.items() if "seconds" in name]
