"""`reft-edge devices`: what an exported model can run on here."""

from reft_edge.commands.console import plain_errors, print_json, say, show_table
from reft_edge.commands.options import Json


def devices(as_json: Json = False) -> None:
    """List what `--device` can name on this machine, and what each of the others would need."""
    from dataclasses import asdict

    with plain_errors():
        from reft_edge.runtime.devices import list_devices
        from reft_edge.runtime.onnx_runtime import import_onnxruntime

        ort = import_onnxruntime()
        found = list_devices(ort)
    if as_json:
        print_json({"onnxruntime": ort.__version__, "devices": [asdict(state) for state in found]})
        return
    rows = [("DEVICE", "HERE", "FOR")]
    rows += [
        (state.name, "; ".join(state.hardware) or "yes" if state.usable else "no", state.runs_on)
        for state in found
    ]
    show_table(rows)
    say(f"\nonnxruntime {ort.__version__}. What the others need:")
    for state in found:
        if not state.usable:
            say(f"{state.name}: {state.install or state.problem}")
