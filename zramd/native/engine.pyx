# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled engine: see zramd/native/__init__.py.

Layout and numbers come from zramd/layout.py and zramd/nbd/protocol.py through a generated header. What is said there of
records, entries and objects is not said again here; what each step does and why is in the Python engine, whose
functions have the same names. Memory is passed in as buffers whose owner outlives the objects here.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport ECONNRESET, EINTR, EPIPE, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.stdio cimport snprintf
from libc.string cimport memcmp, memcpy, memmove, memset, strerror, strlen

import weakref

from zramd.device.algorithms import entry_bits
from zramd.device.codecs import CodecError
from zramd.memory import NoMemoryError

include "steps.pxi"
include "memory.pxi"
include "codecs.pxi"
include "pool.pxi"
include "snapshot.pxi"
include "device.pxi"
include "replies.pxi"
include "transmission.pxi"
