"""The client inside frameworks, one module each; each needs its framework, and nothing else imports it.

- `fastapi`: a client for the life of an application, holds around requests and streams, errors as HTTP answers
"""
