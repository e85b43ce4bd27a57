"""The HTTP service, `meterfall serve`: what a client or a host calls, for every language. Needs the extra `serve`.

- `run`: uvicorn, one process or several; `app`: the application; `door`: time limit, size limit and headers
- `access`: every operation, the right that it needs, and the guard that asks for the API key
- `asking`: the calls of services; `reading`: reports; `changing`: changes of accounts; `probing`: probes
- `bodies`: the bodies of requests; `batches`, `cloudevents`: the body of events, in five forms
- `console`: the pages for people
- `problems`: errors as problem documents; `limits`: what is left, as headers
- `openapi`, `asyncapi`: the published documents
- `service`: the parts of one process, and how many calls they take at once
"""
