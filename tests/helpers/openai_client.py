"""OpenAI's own client on an app of ours, without a socket."""

import httpx
import openai
from fastapi.testclient import TestClient


def openai_over(client: TestClient) -> openai.OpenAI:
    """Sends every request through `client`."""

    def send(request: httpx.Request) -> httpx.Response:
        headers = {"content-type": "application/json"}
        answer = client.request(request.method, request.url.path, content=request.read(), headers=headers)
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    http = httpx.Client(transport=httpx.MockTransport(send))
    return openai.OpenAI(base_url="http://testserver/v1", api_key="x", max_retries=0, http_client=http)
