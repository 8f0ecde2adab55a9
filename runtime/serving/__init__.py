"""A local server with OpenAI's API. Needs the extra `serve`."""
