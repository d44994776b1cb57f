/* Lets a signal "arrive" before a certain instruction of the interpreter: its handler runs where the
   interpreter looks for signals next, as that of a real one. See interrupts.py. */
#include <Python.h>

static long left;
static int number;
/* The tracer that is replaced meanwhile: that of coverage, for instance. */
static Py_tracefunc former;
static PyObject *former_of;

static int trace(PyObject *unused, PyFrameObject *frame, int what, PyObject *arg) {
    (void)unused;
    (void)arg;
    if (what == PyTrace_CALL)
        return PyObject_SetAttrString((PyObject *)frame, "f_trace_opcodes", Py_True);
    if (what == PyTrace_OPCODE && left > 0 && --left == 0)
        PyErr_SetInterruptEx(number);
    return 0;
}

void start(long instructions, int signal) {
    left = instructions;
    number = signal;
    former = PyThreadState_Get()->c_tracefunc;
    former_of = Py_XNewRef(PyThreadState_Get()->c_traceobj);
    PyEval_SetTrace(trace, NULL);
}

/* How many instructions are left before it arrives; 0: it has. */
long stop(void) {
    PyEval_SetTrace(former, former_of);
    Py_CLEAR(former_of);
    return left;
}
