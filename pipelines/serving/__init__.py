"""Server of published stacks: an HTTP API in the shape of OpenAI's images API, and a page.

`requests` checks what clients send, `models` knows which stacks are served, `app` answers, `batching` gathers the jobs of all
clients, `engine` samples them, and `deployment` puts the engine on Ray Serve and the app on a port.
"""
