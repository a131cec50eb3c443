"""The transmission loop for what makes up nearly all traffic: reads and writes of whole pages, trims, flushes.

Where anything else is next in the buffer, the loop returns, and zramd/nbd/transmission.py goes on from there: it sees
the same buffer, and the device is the same. A segment is a run of requests that fit the scratch memory; its writes are
compressed, then the device is locked once for all of it, and then its reads are decompressed into the replies.
"""

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int, void *, size_t, int)
    ssize_t send(int, const void *, size_t, int)
    int MSG_NOSIGNAL, MSG_DONTWAIT

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int, timespec *)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int)

cdef enum:
    MAX_REQUESTS = 1024  # in a segment
    BUSY_NANOSECONDS = 50000  # of looking for the next request before going to sleep
    MAX_IDLE = 63  # receives without that, where it was in vain

cdef enum Outcome:
    ENDED  # the client sends no more
    UNCOMMON  # what is next is not for this loop
    GONE  # the client is gone; whether it is owed anything has to be found out
    UNSENT  # it is gone, and replies could not be sent
    FAILED  # Python failed: `error` says how
    MORE  # there is more for this loop


cdef inline uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + now.tv_nsec


cpdef uint64_t latency_bucket(uint64_t nanoseconds) noexcept nogil:
    """Return the number of the bucket for a latency."""
    cdef uint64_t shift
    if nanoseconds <= 1 << Z_LATENCY_SHIFT:
        return 0
    nanoseconds -= 1
    shift = highest_bit(nanoseconds)
    if shift >= Z_MAX_LATENCY_SHIFT:
        return Z_LATENCY_BUCKETS - 1
    return ((shift - Z_LATENCY_SHIFT - 1) << Z_LATENCY_STEP_SHIFT) + (nanoseconds >> (shift - Z_LATENCY_STEP_SHIFT)) + 1


cdef class Loop:
    """The loop of one connection, on the buffers of a stream, the inbox and the counters of a transmission.

    `direct` says that the socket may be used without its methods; `flushing`, that a flush has something to do, and
    FLUSH and FUA are not for this loop. `reply_bytes` is the room for replies, twice that of the stream's buffer.
    """

    cdef Stream stream
    cdef Device device
    cdef object inbox
    cdef object sock
    cdef object error
    cdef bint direct
    cdef pollfd watch
    cdef bint extended
    cdef bint read_only
    cdef bint flushing
    cdef uint32_t magic
    cdef uint64_t header
    cdef uint64_t disksize
    cdef uint64_t most
    cdef uint64_t start
    cdef uint64_t end
    cdef uint64_t received
    cdef uint64_t received_at
    cdef uint64_t left_at
    cdef bint owed
    cdef unsigned idle
    cdef unsigned idle_left
    cdef Replies replies
    cdef object counter_words
    cdef uint64_t *counters
    cdef Request *requests
    cdef uint64_t count
    cdef Request *parsed
    cdef list fetched
    cdef char no_space[256]

    def __cinit__(
        self, Stream stream, sock, inbox, counters, *, bint direct, uint64_t disksize, bint structured, bint read_only,
        bint flushing, uint64_t reply_bytes, uint64_t payload
    ):
        self.stream = stream
        self.device = stream.device
        self.sock = sock
        self.inbox = inbox
        self.counter_words = counters
        self.counters = <uint64_t *>address(counters)
        self.direct = direct
        self.watch.fd = sock.fileno()
        self.watch.events = inbox.poll_events
        self.extended = inbox.extended
        self.read_only = read_only
        self.flushing = flushing
        self.magic = inbox.magic
        self.header = inbox.header.size
        self.disksize = disksize
        self.most = min(stream.bytes - self.header, payload)
        self.left_at = -1
        self.replies = Replies(stream, reply_bytes, structured, self.extended)
        self.requests = <Request *>malloc(MAX_REQUESTS * sizeof(Request))
        if self.requests == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.requests)

    def receive(self):
        """Serve what is for this loop. Return whether there is something that is not, else the client sends no more.

        Raises:
            ClientLeftError: the client is gone, and is owed nothing.
            OSError: the connection failed.
        """
        cdef Outcome outcome
        inbox = self.inbox
        while True:
            self._take_inbox()
            with nogil:
                outcome = self.serve()
            self._give_inbox()
            if outcome == ENDED:
                return False
            if outcome == UNCOMMON:
                self.left_at = self.received - (self.end - self.start)
                return True
            if outcome == GONE:
                inbox.require_client()
                self.owed = True
            elif outcome == UNSENT and inbox.said_disconnect():
                self.replies.size = 0
            else:
                error, self.error = self.error, None
                raise error

    cdef int _take_inbox(self) except -1:
        self.start, self.end, self.received = self.inbox.start, self.inbox.end, self.inbox.received
        self.received_at = self.inbox.received_at
        return 0

    cdef int _give_inbox(self) except -1:
        self.inbox.start, self.inbox.end, self.inbox.received = self.start, self.end, self.received
        self.inbox.received_at = self.received_at
        return 0

    cdef Outcome serve(self) noexcept nogil:
        # What the other engine was given and has left here is a request of which more has to come.
        cdef bint fresh = self.received - (self.end - self.start) != self.left_at
        cdef Outcome outcome, found
        cdef uint64_t begin
        while True:
            begin = self.start
            found = self.parse()
            if self.count:
                self.counters[Z_REQUESTS_IN_FLIGHT] = self.count
                outcome = self.apply()
                if outcome == GONE:
                    self.start = begin
                if outcome != MORE:
                    return outcome
                step("applied")
                if self.requests + self.count < self.parsed:
                    found = MORE
                self.answer()
            if self.replies.size:
                outcome = self.send_replies()
                if outcome != MORE:
                    return outcome
                self.note_answers()
            if found == MORE:
                continue
            if found == UNCOMMON and fresh:
                return UNCOMMON
            outcome = self.receive_more()
            if outcome != MORE:
                return outcome
            fresh = True

    cdef void take_error(self) noexcept with gil:
        self.error = self.device.pool.take_error()

    cdef Outcome parse(self) noexcept nogil:
        """Consume a segment's requests, and compress what they write. Return what comes behind it: ENDED is nothing."""
        cdef const uint8_t *buffer = self.stream.start
        cdef uint64_t capacity = self.stream.capacity
        cdef uint64_t pages = 0, room = self.replies.room
        cdef uint64_t offset, length, after, needed, count
        cdef unsigned flags, command
        cdef const uint8_t *header
        cdef Request *request
        cdef bint is_write
        self.count = 0
        while self.end - self.start >= self.header:
            header = buffer + self.start
            flags, command, offset = get16(header + 4), get16(header + 6), get64(header + 16)
            length = get64(header + 24) if self.extended else get32(header + 24)
            if get32(header) != self.magic or length > self.most or not self.is_common(flags, command, offset, length):
                return UNCOMMON
            is_write = command == Z_COMMAND_WRITE
            after = self.start + self.header + (length if is_write else 0)
            if after > self.end:
                return ENDED
            # Trims need no room, but take time under the lock as the others do.
            count = 0 if command == Z_COMMAND_FLUSH else length >> Z_PAGE_SHIFT
            needed = MAX_REPLY + (count * MAX_PAGE_REPLY if command == Z_COMMAND_READ else 0)
            if self.count == MAX_REQUESTS or pages + count > capacity or needed > room:
                # A buffer too small for anything would never get further.
                return MORE if self.count else UNCOMMON
            request = &self.requests[self.count]
            request.cookie, request.offset, request.length = get64(header + 8), offset, length
            request.command, request.page, request.failed, request.fetched = command, pages, False, False
            request.payload = header + self.header
            if is_write:
                self.prepare(request)
            pages += count
            room -= needed
            self.count += 1
            self.start = after
        return ENDED

    cdef void prepare(self, const Request *request) noexcept nogil:
        """Compress what a request writes."""
        self.stream.prepare_pages(
            request.payload,
            request.length >> Z_PAGE_SHIFT,
            self.stream.pages + request.page,
            self.stream.scratch + request.page * Z_PAGE_SIZE,
        )

    cdef bint choose_codecs(self) noexcept with gil:
        """Take the device's codecs anew, and compress anew what was compressed with an earlier one."""
        cdef uint64_t number
        try:
            self.stream.choose(self.device.algorithms, self.device.record[Z_DEVICE_RECORD_GENERATION])
        except BaseException as error:
            self.error = error
            return False
        for number in range(self.count):
            if self.requests[number].command == Z_COMMAND_WRITE:
                self.prepare(&self.requests[number])
        return True

    cdef bint is_common(self, unsigned flags, unsigned command, uint64_t offset, uint64_t length) noexcept nogil:
        """Say whether a request is for this loop, and right."""
        cdef unsigned payload = Z_COMMAND_FLAG_PAYLOAD_LEN if self.extended and command == Z_COMMAND_WRITE else 0
        if flags & Z_COMMAND_FLAG_FUA:
            if self.flushing:
                return False
            flags &= ~<unsigned>Z_COMMAND_FLAG_FUA
        if flags != payload:
            return False
        if command == Z_COMMAND_FLUSH:
            return not self.flushing
        if command == Z_COMMAND_WRITE or command == Z_COMMAND_TRIM:
            if self.read_only:
                return False
        elif command != Z_COMMAND_READ:
            return False
        return (
            length != 0
            and (command == Z_COMMAND_TRIM or not (offset | length) & (Z_PAGE_SIZE - 1))
            and offset <= self.disksize
            and length <= self.disksize - offset
        )

    cdef Outcome enter(self) noexcept nogil:
        """Take the device's lock, unless the client is gone."""
        cdef pthread_mutex_t *mutex = &self.device.lock.mutex
        pthread_mutex_lock(mutex)
        # The fence: see zramd/nbd/inbox.py.
        self.watch.revents = 0
        if not self.owed and poll(&self.watch, 1, 0) > 0:
            pthread_mutex_unlock(mutex)
            return GONE
        self.owed = False
        if self.stream.generation != self.device.record[Z_DEVICE_RECORD_GENERATION] and not self.choose_codecs():
            pthread_mutex_unlock(mutex)
            return FAILED
        return MORE

    cdef Outcome apply(self) noexcept nogil:
        """Apply a segment under the device's lock; if the client is gone, do nothing.

        A read of what is in the backing store ends a segment, and goes on as the first of the next.
        """
        cdef uint64_t *superblock = self.device.superblock
        cdef pthread_mutex_t *mutex = &self.device.lock.mutex
        cdef Page *pages
        cdef Request *request = self.requests
        cdef Request *end = request + self.count
        cdef uint8_t *scratch
        cdef uint64_t count
        cdef Outcome outcome = self.enter()
        self.parsed = end
        if outcome != MORE:
            return outcome
        while request < end:
            count = request.length >> Z_PAGE_SHIFT
            pages = self.stream.pages + request.page
            if request.command == Z_COMMAND_READ:
                scratch = self.stream.scratch + request.page * Z_PAGE_SIZE
                if not request.fetched and self.device.load(request.offset >> Z_PAGE_SHIFT, pages, count, scratch):
                    if request > self.requests:
                        self.start = request.payload - self.header - self.stream.start
                        self.count = request - self.requests
                        break
                    pthread_mutex_unlock(mutex)
                    outcome = self.enter() if self.fetch(request) else FAILED
                    if outcome != MORE:
                        return outcome
                    continue
                superblock[Z_SUPERBLOCK_READS] += 1
                superblock[Z_SUPERBLOCK_READ_SECTORS] += request.length >> 9
            elif request.command == Z_COMMAND_WRITE:
                superblock[Z_SUPERBLOCK_WRITES] += 1
                superblock[Z_SUPERBLOCK_WRITE_SECTORS] += request.length >> 9
                if not self.device.store(request.offset >> Z_PAGE_SHIFT, pages, count, self.stream.bits):
                    superblock[Z_SUPERBLOCK_FAILED_WRITES] += 1
                    request.failed = True
                    snprintf(self.no_space, sizeof(self.no_space), "%s", self.device.pool.text)
            elif request.command == Z_COMMAND_TRIM:
                self.device.discard(request.offset, request.length)
            request += 1
        if self.device.pool.failing:
            self.take_error()
            outcome = FAILED
        pthread_mutex_unlock(mutex)
        return outcome

    cdef bint fetch(self, Request *request) noexcept with gil:
        """Read all pages of a request, in the backing store or not; the lock is not held."""
        cdef Page *page = self.stream.pages + request.page
        cdef bytes whole
        try:
            self.fetched = self.device.owner().fetch_pages(
                request.offset >> Z_PAGE_SHIFT, request.length >> Z_PAGE_SHIFT
            )
            for found in self.fetched:
                page.length, page.pattern = UNREADABLE if found is None else FETCHED, 0
                if found is not None:
                    whole = found
                    page.data = <const uint8_t *><char *>whole
                page += 1
            request.fetched = True
            return True
        except BaseException as error:
            self.error = error
            return False

    cdef void answer(self) noexcept nogil:
        """Add the replies to a segment."""
        cdef Request *request = self.requests
        cdef Request *end = request + self.count
        cdef uint64_t *superblock = self.device.superblock
        while request < end:
            if request.failed:
                self.replies.fail(request, Z_ERROR_ENOSPC, self.no_space)
            elif request.command != Z_COMMAND_READ:
                self.replies.done(request)
            elif not self.replies.read(request):
                pthread_mutex_lock(&self.device.lock.mutex)
                superblock[Z_SUPERBLOCK_FAILED_READS] += 1
                pthread_mutex_unlock(&self.device.lock.mutex)
                self.replies.fail(request, Z_ERROR_EIO, self.replies.damage)
                request.failed = True
            request += 1

    cdef void note_answers(self) noexcept nogil:
        """Count a segment, which is answered now."""
        cdef Request *request = self.requests
        cdef Request *end = request + self.count
        cdef uint64_t latency = monotonic_ns() - self.received_at
        cdef uint64_t bucket = Z_REQUEST_RECORD_BUCKETS + latency_bucket(latency)
        cdef uint64_t *row
        while request < end:
            row = self.counters + request.command * Z_REQUEST_RECORD_END
            row[bucket] += 1
            row[Z_REQUEST_RECORD_NANOSECONDS] += latency
            if request.failed:
                row[Z_REQUEST_RECORD_ERRORS] += 1
            elif request.command != Z_COMMAND_FLUSH:
                row[Z_REQUEST_RECORD_BYTES] += request.length
            request += 1
        self.counters[Z_REQUESTS_IN_FLIGHT] = 0

    cdef Outcome receive_more(self) noexcept nogil:
        """Receive into the free end of the buffer, as Inbox.receive does."""
        cdef uint64_t size = self.stream.bytes
        cdef uint8_t *buffer = self.stream.start
        cdef ssize_t count
        cdef bint again = True
        if not self.direct:
            return self._receive_more()
        if self.start == self.end:
            self.start = self.end = 0
        elif size - self.end < size // 4:
            memmove(buffer, buffer + self.start, self.end - self.start)
            self.start, self.end = 0, self.end - self.start
        while True:
            count = self.receive_soon(buffer + self.end, size - self.end)
            if count < 0:
                count = recv(self.watch.fd, buffer + self.end, size - self.end, 0)
            if count > 0:
                self.end += count
                self.received += count
                self.received_at = monotonic_ns()
                return MORE
            if count == 0:
                return ENDED
            if errno == ECONNRESET and again:
                again = False
            elif errno != EINTR:
                return self.fail_with(errno, FAILED)

    cdef ssize_t receive_soon(self, uint8_t *out, uint64_t room) noexcept nogil:
        """Receive what comes in a short while, without going to sleep; -1 if nothing did.

        To be woken takes longer than a client that waits for each answer takes for its next request. Where looking was
        in vain it is done ever less often.
        """
        cdef timespec start, now
        cdef ssize_t count
        if self.idle_left:
            self.idle_left -= 1
            return -1
        clock_gettime(CLOCK_MONOTONIC, &start)
        while True:
            count = recv(self.watch.fd, out, room, MSG_DONTWAIT)
            if count >= 0:
                self.idle = 0
                return count
            clock_gettime(CLOCK_MONOTONIC, &now)
            if (now.tv_sec - start.tv_sec) * 1000000000 + now.tv_nsec - start.tv_nsec > BUSY_NANOSECONDS:
                self.idle_left = self.idle = min(2 * self.idle + 1, <unsigned>MAX_IDLE)
                return -1
            sched_yield()

    cdef Outcome _receive_more(self) noexcept with gil:
        try:
            self._give_inbox()
            more = self.inbox.receive()
            self._take_inbox()
            return MORE if more else ENDED
        except BaseException as error:
            self.error = error
            return FAILED

    cdef Outcome fail_with(self, int number, Outcome outcome) noexcept with gil:
        self.error = OSError(number, strerror(number).decode())
        return outcome

    cdef Outcome send_replies(self) noexcept nogil:
        """Send all replies. The lock is not held: a slow client holds up nobody else."""
        cdef uint64_t sent = 0
        cdef ssize_t count
        while sent < self.replies.size:
            if not self.direct:
                return self._send_replies()
            count = send(self.watch.fd, self.replies.start + sent, self.replies.size - sent, MSG_NOSIGNAL)
            if count >= 0:
                sent += count
            elif errno != EINTR:
                return self.fail_with(errno, UNSENT if errno == EPIPE or errno == ECONNRESET else FAILED)
        self.replies.size = 0
        return MORE

    cdef Outcome _send_replies(self) noexcept with gil:
        cdef uint64_t sent = 0
        try:
            while sent < self.replies.size:
                sent += self.sock.sendmsg([PyMemoryView_FromMemory(
                    <char *>self.replies.start + sent, self.replies.size - sent, PyBUF_READ
                )])
            self.replies.size = 0
            return MORE
        except (BrokenPipeError, ConnectionResetError) as error:
            self.error = error
            return UNSENT
        except BaseException as error:
            self.error = error
            return FAILED
