"""How buckets of S3 are asked: at the address, for the region and with the keys of a client of s3fs.

All of that is learnt from public calls: the address from ``generate_presigned_url``, whose signature is dropped at
once, the keys from the session, which renews them. Requests are signed by botocore's own signer.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

from fsspec.asyn import sync

from dask_embedding_reader.storage.connections import FileSystem
from dask_embedding_reader.storage.direct.http import Connections, Timeouts
from dask_embedding_reader.storage.direct.site import Address, NotDirectError, Site

_PROBE = "probe"
"""The name of a file that an address is learnt for."""

_GLOBAL = "s3.amazonaws.com"
"""Presigned URLs lead to any region by this name, and on from there by a redirect; requests go to the region itself."""

_REGION = re.compile(r"\bs3(?:-accesspoint)?[.-](?:dualstack\.)?([a-z]{2}(?:-[a-z]+)+-\d+)\.amazonaws\.com")
"""The region in the name of a server of Amazon: that of an access point may be another than the client's."""


def find_s3(filesystem: FileSystem, path: str) -> Address:
    """Return where a file of ``S3FileSystem`` is."""
    bucket, key, version = filesystem.split_path(path)
    rest = "/" + quote(key, safe="/~") + (f"?versionId={quote(version, safe='')}" if version else "")
    return Address(f"s3://{bucket}", rest, lambda: _make_site(filesystem, bucket))


class _Learnt(NamedTuple):
    """What a client says of a bucket."""

    client: Any
    """The client, of aiobotocore."""
    url: str
    """The address of a file in the bucket, without a signature."""
    key_id: str | None
    """The public part of the key that it signs with; None where it signs nothing."""
    credentials: Any
    """The whole key; None where it signs nothing."""
    ca_bundle: str | None
    """The certificates that the session trusts, if it says so."""


def _make_site(filesystem: FileSystem, bucket: str) -> Site:
    """Make a site that asks as this client does: at the same address, with the same options and the same key."""
    learnt = sync(filesystem.loop, _learn, filesystem, bucket)
    config = learnt.client.meta.config
    if not learnt.url.endswith(f"/{_PROBE}"):
        raise NotDirectError("its addresses are unusual")
    if config.client_cert is not None:
        raise NotDirectError("it shows a certificate")
    tls = _tls(filesystem, learnt)
    # The order of words is that of botocore: `user_agent_extra` is the user's own.
    headers = {"user-agent": " ".join(filter(None, ["dask-embedding-reader", config.user_agent_extra]))}
    headers |= _headers_of_options(filesystem, learnt.client)
    sign = None if learnt.credentials is None else _signer(filesystem, learnt)

    def make_headers(url: str, byte_range: str) -> Mapping[str, str]:
        asking = {**headers, "range": byte_range}
        return {**(asking if sign is None else sign(url, asking)), "accept-encoding": "identity"}

    connections = Connections(Timeouts(config.connect_timeout, config.read_timeout, None), tls)
    return Site(learnt.url.removesuffix(f"/{_PROBE}"), make_headers, connections, is_web=False)


async def _learn(filesystem: FileSystem, bucket: str) -> _Learnt:
    await filesystem.set_session()
    client = await filesystem.get_s3(bucket)
    presigned = urlsplit(await client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": _PROBE}))
    # Which way of signing is in the URL depends on the region; both tell the key.
    query = parse_qs(presigned.query)
    key_id = (query.get("AWSAccessKeyId") or [text.partition("/")[0] for text in query.get("X-Amz-Credential", [])])[:1]
    server = presigned.netloc.replace(_GLOBAL, urlsplit(client.meta.endpoint_url).netloc)
    return _Learnt(
        client,
        presigned._replace(netloc=server, query="").geturl(),
        key_id[0] if key_id else None,
        await _credentials(filesystem) if presigned.query else None,
        filesystem.session.get_config_variable("ca_bundle"),
    )


async def _credentials(filesystem: FileSystem) -> Any:
    """Return the keys that a client of this file system was made with, as it chooses them itself."""
    names = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "aws_session_token": "token"}
    given = [filesystem.client_kwargs.get(name, getattr(filesystem, own)) for name, own in names.items()]
    if given[0] is None:
        return await filesystem.session.get_credentials()
    return import_module("aiobotocore.credentials").AioCredentials(*given)


def _headers_of_options(filesystem: FileSystem, client: Any) -> dict[str, str]:
    """Return what the options for requests, such as who pays, say in headers."""
    members = client.meta.service_model.operation_model("GetObject").input_shape.members
    options = {**filesystem.s3_additional_kwargs, **filesystem.req_kw}
    headers = {}
    for name in options.keys() & members.keys():
        told = members[name].serialization
        # The keys of customers are sent in other words.
        if told.get("location") != "header" or not isinstance(options[name], str) or name.startswith("SSECustomer"):
            raise NotDirectError(f"it uses {name}")
        headers[told["name"].lower()] = options[name]
    return headers


def _tls(filesystem: FileSystem, learnt: _Learnt) -> ssl.SSLContext | None:
    """Return how a client checks certificates; refuse where it connects in a way that has to be arranged for."""
    session, utils = import_module("botocore.httpsession"), import_module("botocore.utils")
    proxies = learnt.client.meta.config.proxies
    if proxies is None:
        proxies = utils.get_environ_proxies(learnt.url)
    if session.ProxyConfiguration(proxies).proxy_url_for(learnt.url) is not None:
        raise NotDirectError("it uses a proxy")
    if not learnt.url.startswith("https:"):
        return None
    verify = filesystem.client_kwargs.get("verify", learnt.ca_bundle)
    if verify is None:
        verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    if not verify:
        raise NotDirectError("it does not check certificates")
    return ssl.create_default_context(cafile=session.get_cert_path(verify))


def _signer(filesystem: FileSystem, learnt: _Learnt) -> Callable[[str, Mapping[str, str]], Mapping[str, str]]:
    """Return what signs requests as the client does, always with the keys of the day."""
    config = learnt.client.meta.config
    if config.signature_version not in ("s3v4", "v4"):
        raise NotDirectError("it signs in another way")
    auth, awsrequest = import_module("botocore.auth"), import_module("botocore.awsrequest")
    found = _REGION.search(urlsplit(learnt.url).netloc)
    region = found[1] if found else learnt.client.meta.region_name
    credentials = learnt.credentials
    keys = sync(filesystem.loop, credentials.get_frozen_credentials)
    if keys.access_key != learnt.key_id:
        raise NotDirectError("it signs with keys of its own")
    expire = isinstance(credentials, import_module("botocore.credentials").RefreshableCredentials)

    def sign(url: str, headers: Mapping[str, str]) -> Mapping[str, str]:
        now = sync(filesystem.loop, credentials.get_frozen_credentials) if expire else keys
        request = awsrequest.AWSRequest("GET", url, headers)
        auth.S3SigV4Auth(now, "s3", region).add_auth(request)
        return {name.lower(): value for name, value in request.headers.items()}

    return sign
