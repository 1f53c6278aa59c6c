"""The client process of NVFlare, without the requests that a site does not answer. No torch.

It does not say the address that its machine has in the network of the site either.

A site's rights (``authorization.json``) are looked at only where the coordinator's server says that
they have to be, and that server is the coordinator's. So whatever reads files, logs or the
environment of the site, or changes how it runs, is not there at all.
"""

from __future__ import annotations

import runpy

CLIENT = "nvflare.private.fed.app.client.client_train"
ANSWERED = {
    "ClientStatusProcessor", "CheckResourceProcessor", "CancelResourceProcessor", "DeployProcessor",
    "StartJobProcessor", "NotifyJobStatusProcessor", "AbortTaskProcessor", "AbortAppProcessor",
    "DeleteRunNumberProcessor",
}  # fmt: skip
"""Begin an outer round, end it, and say which one is under way."""


def say_little() -> None:
    """Take all other requests out of NVFlare's list, and hide the address, in this process."""
    from nvflare.private.fed import authenticator
    from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

    authenticator._get_client_ip = lambda: "127.0.0.1"
    processors = ClientRequestProcessors.request_processors
    processors[:] = [one for one in processors if type(one).__name__ in ANSWERED]


if __name__ == "__main__":
    say_little()
    runpy.run_module(CLIENT, run_name="__main__", alter_sys=True)
