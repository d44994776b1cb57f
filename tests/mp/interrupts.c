/* Lets a signal "arrive" before a certain instruction of the interpreter: its handler runs where the
   interpreter looks for signals next, as that of a real one. See interrupts.py. */
#include <Python.h>

static long left;
static int number;

static void count(void) {
    if (left > 0 && --left == 0)
        PyErr_SetInterruptEx(number);
}

#if PY_VERSION_HEX >= 0x030C0000

/* A trace function of 3.12 is told of the instructions of a code object from its second call on. So
   this is a callback of sys.monitoring, which is told of all, in all threads. */
static unsigned long thread;

static PyObject *on_instruction(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    (void)args;
    (void)nargs;
    if (PyThread_get_thread_ident() == thread)
        count();
    Py_RETURN_NONE;
}

static PyMethodDef method = {
    "on_instruction", (PyCFunction)(void (*)(void))on_instruction, METH_FASTCALL, NULL};

PyObject *callback(void) { return PyCFunction_New(&method, NULL); }

void start(long instructions, int signal) {
    thread = PyThread_get_thread_ident();
    left = instructions;
    number = signal;
}

/* How many instructions are left before it arrives; 0: it has. */
long stop(void) { return left; }

#else

/* The tracer that is replaced meanwhile: that of coverage, for instance. */
static Py_tracefunc former;
static PyObject *former_of;

static int trace(PyObject *unused, PyFrameObject *frame, int what, PyObject *arg) {
    (void)unused;
    (void)arg;
    if (what == PyTrace_CALL)
        return PyObject_SetAttrString((PyObject *)frame, "f_trace_opcodes", Py_True);
    if (what == PyTrace_OPCODE)
        count();
    return 0;
}

PyObject *callback(void) { Py_RETURN_NONE; }

void start(long instructions, int signal) {
    left = instructions;
    number = signal;
    former = PyThreadState_Get()->c_tracefunc;
    former_of = Py_XNewRef(PyThreadState_Get()->c_traceobj);
    PyEval_SetTrace(trace, NULL);
}

long stop(void) {
    PyEval_SetTrace(former, former_of);
    Py_CLEAR(former_of);
    return left;
}

#endif
