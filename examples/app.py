"""A page with a text box and a choice of adapters; answers stream into it.

    pip install 'reft-edge[cpu,serve]'
    python examples/app.py smol/ pirate.safetensors emoji.safetensors

Then open http://127.0.0.1:8000. Several people may ask at once: the engine answers them in one batch.
"""

import sys
from collections.abc import Iterator
from html import escape

import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel

from reft_edge import Engine, ReftEdgeError, SteeredModel
from reft_edge.runtime import Request

PAGE = """<!doctype html><meta charset="utf-8"><title>reft-edge</title>
<form><select name="adapter"><option value="">no adapter</option>OPTIONS</select>
<input name="prompt" size="60" value="Who are you?"><button>Ask</button></form><pre style="white-space: pre-wrap"></pre>
<script>
const form = document.querySelector("form"), answer = document.querySelector("pre");
form.onsubmit = async (event) => {
  event.preventDefault();
  const body = JSON.stringify(Object.fromEntries(new FormData(form)));
  const reply = await fetch("answer", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  answer.textContent = "";
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) answer.textContent += part.value;
};
</script>"""


class Question(BaseModel):
    prompt: str
    adapter: str = ""


def create_app(folder: str, *adapters: str) -> FastAPI:
    """The app of an exported folder and of adapter files for it."""
    model = SteeredModel(folder)
    names = [model.load_adapter(path) for path in adapters]
    engine, app = Engine(model), FastAPI()

    @app.get("/")
    def page() -> HTMLResponse:
        options = "".join(f"<option>{escape(name)}</option>" for name in names)
        return HTMLResponse(PAGE.replace("OPTIONS", options))

    @app.post("/answer")
    def answer(question: Question) -> Response:
        if question.adapter not in ("", *names):
            return PlainTextResponse(f"there is no adapter {question.adapter}", status_code=400)
        chosen = {question.adapter: 1.0} if question.adapter else {}
        try:
            ids = tuple(model.encode(question.prompt, chosen))
            ticket = engine.submit(Request(ids, chosen, max_tokens=256))
        except ReftEdgeError as error:
            return PlainTextResponse(str(error), status_code=400)

        def pieces() -> Iterator[str]:
            try:
                for piece in ticket:
                    yield piece.text if piece.error is None else str(piece.error)
            finally:
                ticket.cancel()  # whoever closes the page frees the slot

        return StreamingResponse(pieces(), media_type="text/plain; charset=utf-8")

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(*sys.argv[1:]))
