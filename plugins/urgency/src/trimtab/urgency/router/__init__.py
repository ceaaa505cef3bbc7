"""The router: several OpenAI-compatible servers behind one address, each call sent where it pays.

`application` puts it together: `forwarding` carries a call to a server that `admission` found for
it, by what `backends` knows of them all.
"""
