/* A call in one step: the request, the wait and the reply, or on the server's side a request and then its reply. What
 * each step does is written in fastsplit/wire/blocking/ and in session.py; read that first. frames.c has the frames.
 *
 * Rules. What is not plain (a new shape, another kind of frame, tensors elsewhere, another thread that sends or reads,
 * anything that is to be refused) is left to Python: then nothing has happened, and a frame that was looked at is still
 * there, in its slot or in the session's staging memory. Between the last look and the write, and while a frame takes
 * effect, no Python code runs and the interpreter's lock is held: so each of these is one step for other threads and
 * for signals' handlers. (In CPython 3.11 the collector runs where a container is made. Such ones are made before or
 * after.) A slot is copied out, and only the copy is read.
 */

#include "fastpath.h"

#include <stddef.h>
#include <string.h>
#include <structmember.h>
#include <sys/socket.h>

enum {
    MAX_DEAD = 64,
    MAX_UNLOOKED_NBYTES = 1 << 20 /* after these Python sends a request, and a probe before it if one is due */
};

/* Has the arena free the blocks whose leases died, if these are many. Runs Python code. 0 with an error. */
static int sort_out(const FastPath *self) {
    if (!self->is_ring || PyObject_Size(self->dead) <= MAX_DEAD) return 1;
    PyObject *done = PyObject_CallMethodNoArgs(self->arena, str_sort_out);
    Py_XDECREF(done);
    return done != NULL;
}

/* Adds what was counted to the connection's Stats, whose numbers go on growing for who holds them. An error that is
 * there stays; what cannot be added is added the next time. */
static void tell(FastPath *self) {
    long long *spent[3] = {&self->serialization_ns, &self->wait_ns, &self->remote_ns};
    PyObject *seconds[3] = {str_serialization_s, str_wait_s, str_remote_s};
    unsigned long long *counted[2] = {&self->calls, &self->copied_nbytes};
    PyObject *counts[2] = {str_calls, str_bytes_copied}, *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (int i = 0; i < 3; i++) {
        if (*spent[i] == 0) continue;
        double total_s = real_of(self->stats, seconds[i]) + (double)*spent[i] * 1e-9;
        if (!PyErr_Occurred() && set(self->stats, seconds[i], PyFloat_FromDouble(total_s))) *spent[i] = 0;
    }
    for (int i = 0; i < 2; i++) {
        if (*counted[i] == 0) continue;
        long long total = number_of(self->stats, counts[i]) + (long long)*counted[i];
        if (!PyErr_Occurred() && set(self->stats, counts[i], PyLong_FromLongLong(total))) *counted[i] = 0;
    }
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
}

/* ---- a client's calls ---- */

typedef struct {
    PyObject *reader, *core, *ident, *id, *op, *attrs, *timeout, *expected;
    int64_t started_ns, sent_ns, timeout_ns; /* below 0: no deadline */
    Out out;
} Request;

static void drop_request(Request *request) {
    Py_CLEAR(request->id);
    Py_CLEAR(request->out.kept);
    Py_CLEAR(request->core);
    Py_CLEAR(request->ident);
}

/* Nanoseconds of a timeout in seconds; below 0 for None and for what is as good as for ever. */
static int64_t timeout_of(PyObject *timeout) { /* -1, perhaps with an error */
    double timeout_s = timeout == Py_None ? -1 : PyFloat_AsDouble(timeout);
    return timeout_s < 0 || timeout_s > 1e9 ? -1 : (int64_t)(timeout_s * 1e9);
}

static int identify(Request *request, PyObject *reader) {
    request->reader = reader;
    request->ident = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
    request->core = PyObject_GetAttr(reader, str_core);
    return request->ident != NULL && request->core != NULL;
}

/* The arguments of `call` and `submit`: reader, op, tensors, attrs, timeout_s, expected. 1, 0, or -1 with an error. */
static int begin(FastPath *self, Request *request, PyObject *const *args, Py_ssize_t nargs) {
    memset(request, 0, offsetof(Request, out.copied_nbytes));
    if (nargs != 6) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, expected 6", nargs);
        return -1;
    }
    request->op = args[1], request->attrs = args[3], request->timeout = args[4], request->expected = args[5];
    request->started_ns = native_now_ns();
    request->timeout_ns = timeout_of(request->timeout);
    if (PyErr_Occurred()) return -1;
    if (request->timeout_ns == 0) return 0;
    int known = sort_out(self) ? native_add_tensors(self, args[2], &request->out) : -1;
    return known == 1 && !identify(request, args[0]) ? -1 : known;
}

/* Whether this thread is in the middle of a call or serves its connection: then its calls are an error of Python's. */
static int is_inside(const FastPath *self, const Request *request) {
    return PySet_Contains(self->inside, request->ident) || PySet_Contains(self->greeting, request->ident);
}

/* Whether a request may be sent now, without waiting for a turn: 1, and then `send_request` comes next; 0, or -1 with
 * an error. */
static int may_request(FastPath *self, const Request *request) {
    int taken = native_take_sending(self);
    if (taken <= 0) return taken;
    if (is_inside(self, request) || is_true(request->reader, str_turns) || is_true(request->core, str_refusing) ||
        is_true(self->session, str_may_request) != 1 ||
        PyDict_GET_SIZE(self->requests) >= number_of(request->core, str_max_inflight)) {
        native_leave_sending(self);
        return PyErr_Occurred() ? -1 : 0;
    }
    if (self->unlooked_nbytes < MAX_UNLOOKED_NBYTES) return 1;
    self->unlooked_nbytes = 0;
    native_leave_sending(self);
    return 0;
}

/* Sends a request. `future`: of `submit`, NULL of `call`. 1; PARTLY: `send_rest` comes next; 0: nothing has happened;
 * -1 with an error. */
static int send_request(FastPath *self, Request *request, PyObject *future) {
    Header header = {KIND_REQUEST, 0, 0, 0, 0, 0, request->timeout_ns > 0 ? (uint64_t)request->timeout_ns : 0};
    header.flags = (uint64_t)number_of(request->core, str_flags);
    PyObject *id = request->id = PyObject_GetAttr(self->session, str_next_id), *calls = NULL;
    header.request_id = id == NULL ? 0 : PyLong_AsUnsignedLongLong(id);
    if (future != NULL) {
        calls = PyObject_GetAttr(request->core, str_calls);
        if (calls == NULL || PyObject_SetAttr(future, str__id, id) < 0 || PyDict_SetItem(calls, id, future) < 0) {
            Py_XDECREF(calls);
            native_leave_sending(self);
            return -1;
        }
    }
    PyObject *next_id = PyLong_FromUnsignedLongLong(header.request_id + 1);
    int sent = PyErr_Occurred() || PyDict_SetItem(self->requests, id, request->expected) < 0 ? -1 : 1;
    if (sent == 1) sent = native_put_frame(self, &header, request->op, request->attrs, &request->out);
    if (sent == 1 && PyObject_SetAttr(self->session, str_next_id, next_id) < 0) sent = -1;
    if (sent <= 0) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        if (id != NULL && (PyDict_DelItem(self->requests, id) < 0 || (calls != NULL && PyDict_DelItem(calls, id) < 0)))
            PyErr_Clear(); /* it was never there */
        PyErr_Restore(type, value, trace);
    }
    Py_XDECREF(next_id);
    Py_XDECREF(calls);
    if (self->rest == NULL) native_leave_sending(self);
    else if (PySet_Add(self->inside, request->ident) < 0) PyErr_Clear(); /* its calls would wait for itself */
    if (sent == 1 && self->rest != NULL) sent = PARTLY;
    request->sent_ns = sent > 0 ? self->encoded_ns : native_now_ns();
    self->serialization_ns += request->sent_ns - request->started_ns;
    return sent;
}

static PyObject *make_future(FastPath *self, const Request *request) {
    PyObject *deadline = request->timeout_ns < 0
                             ? Py_NewRef(Py_None)
                             : PyFloat_FromDouble((double)(request->started_ns + request->timeout_ns) * 1e-9);
    PyObject *sent = PyLong_FromLongLong(request->sent_ns ? request->sent_ns : native_now_ns()), *future = NULL;
    if (deadline != NULL && sent != NULL) {
        PyObject *id = request->id == NULL ? Py_None : request->id;
        PyObject *args[6] = {request->reader, id, request->op, deadline, request->timeout, sent};
        future = PyObject_Vectorcall(self->future_type, args, 6, NULL);
    }
    if (future != NULL && PyObject_SetAttr(future, str__begun, Py_True) < 0) Py_CLEAR(future);
    Py_XDECREF(deadline);
    Py_XDECREF(sent);
    return future;
}

/* Has Python send the rest of this request, and then release `sending`. 0 with an error. */
static int send_rest(FastPath *self, const Request *request, PyObject *future) {
    PyObject *type, *value, *trace, *sent = future == NULL ? NULL : PyObject_CallOneArg(self->send_rest, future);
    if (sent == NULL && self->rest != NULL) { /* a signal's handler was faster */
        PyErr_Fetch(&type, &value, &trace);
        Py_CLEAR(self->rest);
        /* nothing can follow half a frame; in a forked child it is closed */
        if (real_of(self->link, str_timeout_s) >= 0) shutdown(self->fd, SHUT_RDWR);
        native_leave_sending(self);
        PySet_Discard(self->inside, request->ident);
        PyErr_Restore(type, value, trace);
    }
    Py_XDECREF(sent);
    return sent != NULL;
}

/* The future of a call that Python goes on with. NULL with an error. */
static PyObject *go_on(FastPath *self, const Request *request) {
    PyObject *future = make_future(self, request);
    PyObject *calls = future == NULL ? NULL : PyObject_GetAttr(request->core, str_calls);
    if (calls == NULL || PyDict_SetItem(calls, request->id, future) < 0) Py_CLEAR(future);
    Py_XDECREF(calls);
    return future;
}

/* Takes the channel's lock. 1, 0 if another thread has it, or -1 with an error. */
static int lock(PyObject *reader) {
    PyObject *rlock = PyObject_GetAttr(reader, str_lock);
    PyObject *held = rlock == NULL ? NULL : PyObject_CallMethodOneArg(rlock, str_acquire, Py_False);
    Py_XDECREF(rlock);
    Py_XDECREF(held);
    return held == NULL ? -1 : held == Py_True;
}

/* An error that is there stays. */
static void unlock(PyObject *reader) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *rlock = PyObject_GetAttr(reader, str_lock);
    Py_XDECREF(rlock == NULL ? NULL : PyObject_CallMethodNoArgs(rlock, str_release));
    Py_XDECREF(rlock);
    PyErr_Restore(type, value, trace);
}

/* Takes the channel's lock, and looks whether this thread may be the one that reads. The collector may run where the
 * lock is taken, but not after it. 1: the lock is held; 0; or -1 with an error. */
static int may_read(FastPath *self, const Request *request) {
    PyObject *reader = request->reader;
    int held = lock(reader);
    if (held <= 0) return held;
    int plain = native_is_plain(self);
    if (plain == 1 && (is_inside(self, request) || is_true(reader, str_events) || is_true(reader, str_watching) ||
                       number_of(reader, str_reading)))
        plain = PyErr_Occurred() ? -1 : 0;
    if (plain <= 0) unlock(reader);
    return plain;
}

static int begin_reading(const FastPath *self, const Request *request) {
    return PyObject_SetAttr(request->reader, str_reading, request->ident) == 0 &&
           PySet_Add(self->inside, request->ident) == 0;
}

static int stop_reading(const FastPath *self, const Request *request) {
    return set(request->reader, str_reading, PyLong_FromLong(0)) && PySet_Discard(self->inside, request->ident) >= 0;
}

/* This thread no longer reads. `future`: of its call, which goes on, or NULL. 0 with an error; one that was there
 * stays. */
static int end_reading(FastPath *self, const Request *request, PyObject *future) {
    PyObject *type, *value, *trace, *reader = request->reader;
    int is_call = self->op != NULL; /* after `wait` its caller leaves the rest to the watcher */
    PyErr_Fetch(&type, &value, &trace);
    self->op = NULL;
    /* without the lock, a thread that has just seen this one read may be about to wait for it */
    int held = stop_reading(self, request) ? lock(reader) : -1;
    int more =
        held <= 0 || number_of(reader, str_followers) || is_true(request->core, str_closed) ||
        is_true(reader, str_callbacks) || is_true(reader, str_turns) ||
        (is_call && is_true(reader, str_watcher) && (PyDict_GET_SIZE(self->requests) || is_true(reader, str_events)));
    if (held == 1) unlock(reader);
    if (more) {
        PyErr_Clear();
        Py_XDECREF(PyObject_CallMethodOneArg(reader, str_left_fast_path, future == NULL ? Py_None : future));
    }
    if (type != NULL) {
        PyErr_Clear();
        PyErr_Restore(type, value, trace);
    }
    return !PyErr_Occurred();
}

static int is_expected(PyObject *expected, PyObject *descs) {
    if (expected == Py_None) return 1;
    int as = native_count(expected) == PyTuple_GET_SIZE(descs);
    for (Py_ssize_t i = 0; as && i < PyTuple_GET_SIZE(descs); i++) {
        PyObject *pair = PySequence_Fast_GET_ITEM(expected, i), *desc = PyTuple_GET_ITEM(descs, i);
        as = number_of(PyTuple_GET_ITEM(desc, 0), str_code) == PyLong_AsLongLong(PyTuple_GET_ITEM(pair, 0)) &&
             PyObject_RichCompareBool(PyTuple_GET_ITEM(desc, 1), PyTuple_GET_ITEM(pair, 1), Py_EQ) == 1;
    }
    return as;
}

/* Whether a frame is the reply to this request. */
static int is_answer(const FastPath *self, const Request *request, const Frame *frame) {
    PyObject *expected = PyDict_GetItemWithError(self->requests, request->id);
    return expected != NULL && frame->header.request_id == PyLong_AsUnsignedLongLong(request->id) &&
           is_expected(expected, PyTuple_GET_ITEM(frame->message, 1));
}

/* Waits for a frame, and reads it. `request`: it must be the reply to this one; NULL: a request. 1; 0: Python must
 * look; -1 with an error, which a signal's handler may have raised. */
static int await_frame(FastPath *self, const Request *request, int64_t timeout_ns, Frame *frame) {
    int64_t end_ns = timeout_ns < 0 ? INT64_MAX : native_now_ns() + timeout_ns;
    int came = PARTLY;
    memset(frame, 0, sizeof(Frame));
    while (came == PARTLY) {
        native_drop_frame(frame);
        came = native_await(self, end_ns);
        frame->came_ns = native_now_ns();
        if (came == 1) came = native_read_frame(self, request == NULL ? KIND_REQUEST : KIND_REPLY, frame);
        if (came > 0 && request != NULL && !is_answer(self, request, frame)) came = PyErr_Occurred() ? -1 : 0;
        if (came == PARTLY && native_now_ns() >= end_ns) came = 0; /* a peer may dribble */
        if ((came == 0 || came == PARTLY) && request != NULL && PyErr_CheckSignals() < 0) came = -1;
    }
    return came;
}

/* The Result of a reply that was read, which has no effect yet: its leases are not in force. */
static PyObject *make_result(const FastPath *self, const Frame *frame, int64_t waited_ns, int64_t remote_ns) {
    PyObject *result = native_views(self, frame, (PyTypeObject *)self->result_type);
    if (result != NULL && !(set(result, str_attrs, Py_NewRef(PyTuple_GET_ITEM(frame->message, 2))) &&
                            set(result, str_remote_s, PyFloat_FromDouble((double)remote_ns * 1e-9)) &&
                            set(result, str_wait_s, PyFloat_FromDouble((double)waited_ns * 1e-9))))
        Py_CLEAR(result);
    return result;
}

/* Has a reply take effect: in one step with what the caller notes of it. 0 with an error. */
static int take_reply(FastPath *self, const Request *request, Frame *frame, int64_t remote_ns) {
    self->remote_ns += remote_ns;
    return PyDict_DelItem(self->requests, request->id) == 0 && native_take_frame(self, frame);
}

/* Nanoseconds in the handler, as the peer says, but no more than this side waited. */
static int64_t remote_of(const Frame *frame, int64_t waited_ns) {
    return frame->header.time_ns < (uint64_t)waited_ns ? (int64_t)frame->header.time_ns : waited_ns;
}

/* call(reader, op, tensors, attrs, timeout_s, expected): a Result; a Future, if Python must wait for it; None: nothing
 * was sent */
static PyObject *FastPath_call(FastPath *self, PyObject *const *args, Py_ssize_t nargs) {
    Request request;
    Frame frame;
    PyObject *result = NULL, *future = NULL, *type = NULL, *value, *trace;
    int half_sent = 0, going = begin(self, &request, args, nargs);
    if (going == 1) going = may_read(self, &request);
    if (going == 1) {
        going = may_request(self, &request);
        if (going == 1 && !begin_reading(self, &request)) {
            native_leave_sending(self);
            going = -1;
        }
        if (going == 1) going = send_request(self, &request, NULL);
        half_sent = going == PARTLY;
        self->op = going == 1 ? request.op : NULL;
        if (going <= 0 && !stop_reading(self, &request)) going = -1;
        if (half_sent && !set(request.reader, str_reading, PyLong_FromLong(0))) going = -1;
        unlock(request.reader);
    }
    if (half_sent) {
        future = go_on(self, &request);
        if (!send_rest(self, &request, future)) Py_CLEAR(future);
        self->wait_ns += native_now_ns() - request.sent_ns;
    } else if (going == 1) {
        going = await_frame(self, &request, request.timeout_ns, &frame);
        int64_t waited_ns = frame.came_ns - request.sent_ns;
        self->wait_ns += waited_ns;
        if (going == 1) {
            result = make_result(self, &frame, waited_ns, remote_of(&frame, waited_ns));
            if (result != NULL && !take_reply(self, &request, &frame, remote_of(&frame, waited_ns))) Py_CLEAR(result);
        }
        PyErr_Fetch(&type, &value, &trace);
        if (result == NULL) future = go_on(self, &request); /* for Python to wait for, or to cancel */
        native_drop_frame(&frame);
        self->serialization_ns += native_now_ns() - frame.came_ns;
        end_reading(self, &request, future);
        if (type == NULL) PyErr_Fetch(&type, &value, &trace);
        if (type != NULL) {
            PyErr_Clear();
            Py_CLEAR(result);
            if (future != NULL) Py_XDECREF(PyObject_CallMethod(future, "cancel", NULL));
            Py_CLEAR(future);
            PyErr_Clear();
            PyErr_Restore(type, value, trace);
        }
    } else if (going == 0) {
        result = Py_NewRef(Py_None);
    }
    drop_request(&request);
    tell(self);
    return result != NULL ? result : future;
}

/* submit(reader, op, tensors, attrs, timeout_s, expected): a Future; None: nothing was sent */
static PyObject *FastPath_submit(FastPath *self, PyObject *const *args, Py_ssize_t nargs) {
    Request request;
    PyObject *future = NULL;
    int going = begin(self, &request, args, nargs);
    if (going == 1 && (future = make_future(self, &request)) == NULL) going = -1;
    if (going == 1) going = may_request(self, &request);
    if (going == 1) going = send_request(self, &request, future);
    if (going > 0) {
        if (going == PARTLY && !send_rest(self, &request, future)) going = -1;
        self->wait_ns += native_now_ns() - request.sent_ns;
    }
    if (going < 1) Py_CLEAR(future);
    if (going == 0) future = Py_NewRef(Py_None);
    drop_request(&request);
    tell(self);
    return future;
}

/* Gives a future its result, with all that follows from the reply, if it still waits for that. 0 with an error. */
static int settle(FastPath *self, const Request *request, PyObject *calls, PyObject *future, Frame *frame,
                  PyObject *result, int64_t remote_ns) {
    int held = lock(request->reader), done = held >= 0;
    if (held == 1) {
        if (PyDict_GetItem(calls, request->id) == future && !is_true(future, str__callbacks) &&
            !is_true(future, str__waited_for))
            done = take_reply(self, request, frame, remote_ns) && set(future, str__outcome, Py_NewRef(result)) &&
                   set(future, str__done, Py_NewRef(Py_True)) && PyDict_DelItem(calls, request->id) == 0;
        unlock(request->reader);
    }
    return done;
}

/* wait(reader, future, timeout_s): waits for a reply; where Python must wait, the future is not done afterwards */
static PyObject *FastPath_wait(FastPath *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "wait: %zd arguments, expected 3", nargs);
    Request request;
    Frame frame;
    PyObject *future = args[1], *calls = NULL, *result = NULL;
    int64_t timeout_ns = timeout_of(args[2]);
    memset(&request, 0, offsetof(Request, out.copied_nbytes));
    int going = PyErr_Occurred() || !sort_out(self) || !identify(&request, args[0]) ? -1 : 1;
    if (going == 1 && ((request.id = PyObject_GetAttr(future, str__id)) == NULL ||
                       (calls = PyObject_GetAttr(request.core, str_calls)) == NULL))
        going = -1;
    if (going == 1) going = may_read(self, &request);
    if (going == 1) {
        going = PyDict_GetItem(calls, request.id) == future; /* else it is done */
        if (going == 1 && !begin_reading(self, &request)) {
            stop_reading(self, &request);
            going = -1;
        }
        unlock(request.reader);
    }
    if (going == 1) {
        going = await_frame(self, &request, timeout_ns, &frame);
        if (going == 1) {
            int64_t waited_ns = frame.came_ns - number_of(future, str__sent_ns),
                    remote_ns = remote_of(&frame, waited_ns);
            result = make_result(self, &frame, waited_ns, remote_ns);
            if (result == NULL || !settle(self, &request, calls, future, &frame, result, remote_ns)) going = -1;
        }
        native_drop_frame(&frame);
        Py_XDECREF(result);
        int64_t taken_ns = native_now_ns() - frame.came_ns; /* the caller counts all of it as waiting */
        self->serialization_ns += taken_ns;
        self->wait_ns -= taken_ns;
        if (!end_reading(self, &request, NULL)) going = -1;
    }
    Py_XDECREF(calls);
    drop_request(&request);
    tell(self);
    return going < 0 ? NULL : Py_NewRef(Py_None);
}

/* ---- a server's ---- */

/* receive(served): the Call of the next request; None: Python must look */
static PyObject *FastPath_receive(FastPath *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 1) return PyErr_Format(PyExc_TypeError, "receive: %zd arguments, expected 1", nargs);
    Frame frame = {.message = NULL};
    int came = !sort_out(self) ? -1 : native_is_plain(self);
    if (came == 1) came = await_frame(self, NULL, -1, &frame);
    if (came == 1 && native_has_more(self)) came = 0; /* for the thread that reads ahead */
    if (came == 1) came = PyDict_Contains(self->handlers, PyTuple_GET_ITEM(frame.message, 0));
    if (came <= 0) {
        native_drop_frame(&frame);
        return came < 0 ? NULL : Py_NewRef(Py_None);
    }
    PyTypeObject *type = (PyTypeObject *)self->call_type;
    PyObject *attrs = PyTuple_GET_ITEM(frame.message, 2), *call = NULL;
    if (native_take_frame(self, &frame)) call = type->tp_alloc(type, 0);
    double deadline = (double)native_now_ns() * 1e-9 + (double)frame.header.time_ns * 1e-9;
    if (call != NULL &&
        !(set(call, str_op, Py_NewRef(PyTuple_GET_ITEM(frame.message, 0))) &&
          set(call, str_tensors, native_views(self, &frame, &PyTuple_Type)) &&
          set(call, str_attrs, PyDict_GET_SIZE(attrs) ? Py_NewRef(attrs) : PyDict_New()) &&
          set(call, str_reply_attrs, PyDict_New()) && set(call, str__served, Py_NewRef(args[0])) &&
          set(call, str__request_id, PyLong_FromUnsignedLongLong(frame.header.request_id)) &&
          set(call, str__deadline, frame.header.time_ns ? PyFloat_FromDouble(deadline) : Py_NewRef(Py_None)) &&
          set(call, str__flags, PyLong_FromUnsignedLongLong(frame.header.flags))))
        Py_CLEAR(call);
    native_drop_frame(&frame);
    return call;
}

/* reply(call, result, time_ns): whether the reply is sent, perhaps but for a `rest`; if not, nothing has happened but
 * that the call's own tensors were released */
static PyObject *FastPath_reply(FastPath *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "reply: %zd arguments, expected 3", nargs);
    Out out;
    out.kept = NULL;
    PyObject *id = PyObject_GetAttr(args[0], str__request_id), *op = PyUnicode_New(0, 0);
    PyObject *attrs = id == NULL ? NULL : PyObject_GetAttr(args[0], str_reply_attrs);
    Header header = {KIND_REPLY, 0, attrs == NULL ? 0 : PyLong_AsUnsignedLongLong(id), 0, 0, 0, 0};
    if (!PyErr_Occurred()) header.time_ns = PyLong_AsUnsignedLongLong(args[2]);
    int done = PyErr_Occurred() || !set(args[0], str_tensors, PyTuple_New(0)) ? -1 : 1;
    PyObject *result =
        PyList_CheckExact(args[1]) ? PySequence_Tuple(args[1]) : Py_NewRef(args[1]); /* a list may change */
    if (result == NULL) done = -1;
    if (done == 1) done = native_add_tensors(self, result, &out);
    if (done == 1) done = native_take_sending(self);
    if (done == 1) {
        done = native_put_frame(self, &header, op, attrs, &out);
        if (self->rest == NULL) native_leave_sending(self);
    }
    Py_XDECREF(result);
    Py_XDECREF(id);
    Py_XDECREF(attrs);
    Py_XDECREF(op);
    Py_XDECREF(out.kept);
    tell(self);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

/* take_rest(None): bytes that are still to be sent of a frame, b"" for none; the caller has `sending` now */
static PyObject *FastPath_take_rest(FastPath *self, PyObject *Py_UNUSED(ignored)) {
    PyObject *rest = self->rest;
    self->rest = NULL;
    return rest != NULL ? rest : PyBytes_FromStringAndSize(NULL, 0);
}

/* ---- the object ---- */

#define X(name) PyObject *str_##name;
NAMES(X)
#undef X

int native_init_fastpath(void) {
    int known = 1;
#define X(name) known = known && native_intern(&str_##name, #name);
    NAMES(X)
#undef X
    return known;
}

static long long int_of(PyObject *kwargs, const char *name) { /* 0 or more; else an error is set */
    PyObject *value = PyDict_GetItemString(kwargs, name);
    long long number = value == NULL ? -1 : PyLong_AsLongLong(value);
    if (number < 0 && !PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "FastPath: expected %s", name);
    return number;
}

static PyObject *FastPath_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    FastPath *self = kwargs == NULL || PyTuple_GET_SIZE(args) ? NULL : (FastPath *)type->tp_alloc(type, 0);
    if (self == NULL) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "FastPath: expected keywords");
#define X(name)                                                                                                        \
    if ((self->name = Py_XNewRef(PyDict_GetItemString(kwargs, #name))) == NULL) {                                      \
        PyErr_SetString(PyExc_TypeError, "FastPath: expected " #name);                                                 \
        Py_DECREF(self);                                                                                               \
        return NULL;                                                                                                   \
    }
    PARTS(X)
#undef X
    self->is_ring = self->slots != Py_None;
    self->fd = (int)int_of(kwargs, "fd");
    self->known_flags = (unsigned)int_of(kwargs, "known_flags");
    self->max_nbytes = (uint64_t)int_of(kwargs, "max_nbytes");
    self->as_torch = PyDict_GetItemString(kwargs, "as_torch") == Py_True;
    self->may_bring = PyDict_GetItemString(kwargs, "passes_descriptors") == Py_True;
    if (PyErr_Occurred() || (!self->is_ring && PyObject_GetBuffer(self->staging, &self->into, PyBUF_WRITABLE) < 0))
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int FastPath_traverse(FastPath *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
#define X(name) Py_VISIT(self->name);
    PARTS(X)
#undef X
    return 0;
}

static int FastPath_clear(FastPath *self) {
#define X(name) Py_CLEAR(self->name);
    PARTS(X)
#undef X
    return 0;
}

static void FastPath_dealloc(FastPath *self) {
    PyObject_GC_UnTrack(self);
    FastPath_clear(self);
    Py_CLEAR(self->rest);
    PyBuffer_Release(&self->into);
    native_free(self);
}

static PyMethodDef FastPath_methods[] = {
    {"call", (PyCFunction)(void (*)(void))FastPath_call, METH_FASTCALL, NULL},
    {"submit", (PyCFunction)(void (*)(void))FastPath_submit, METH_FASTCALL, NULL},
    {"wait", (PyCFunction)(void (*)(void))FastPath_wait, METH_FASTCALL, NULL},
    {"receive", (PyCFunction)(void (*)(void))FastPath_receive, METH_FASTCALL, NULL},
    {"reply", (PyCFunction)(void (*)(void))FastPath_reply, METH_FASTCALL, NULL},
    {"take_rest", (PyCFunction)FastPath_take_rest, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef FastPath_members[] = {
    {"op", T_OBJECT, offsetof(FastPath, op), READONLY, NULL},
    {"link", T_OBJECT, offsetof(FastPath, link), READONLY, NULL},
    {"rest", T_OBJECT, offsetof(FastPath, rest), READONLY, NULL},
    {"lent_nbytes", T_ULONGLONG, offsetof(FastPath, lent_nbytes), READONLY, NULL},
    {"shared_nbytes", T_ULONGLONG, offsetof(FastPath, shared_nbytes), READONLY, NULL},
    {"sent_nbytes", T_ULONGLONG, offsetof(FastPath, sent_nbytes), READONLY, NULL},
    {"received_nbytes", T_ULONGLONG, offsetof(FastPath, received_nbytes), READONLY, NULL},
    {"staged_nbytes", T_ULONGLONG, offsetof(FastPath, staged_nbytes), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot FastPath_slots[] = {
    {Py_tp_doc, "Calls in one step; see fastsplit.wire.fastpath."},
    {Py_tp_new, FastPath_new},
    {Py_tp_dealloc, FastPath_dealloc},
    {Py_tp_traverse, FastPath_traverse},
    {Py_tp_clear, FastPath_clear},
    {Py_tp_methods, FastPath_methods},
    {Py_tp_members, FastPath_members},
    {0, NULL},
};

PyType_Spec native_fastpath_spec = {
    .name = "fastsplit._native.FastPath",
    .basicsize = sizeof(FastPath),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = FastPath_slots,
};
