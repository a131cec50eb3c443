"""Steps at which tests/crash kills the process. Without ZRAMD_STEPS, which only those tests define, they are nothing."""

cdef extern from *:
    """
    #ifdef ZRAMD_STEPS
    #include <signal.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <unistd.h>
    /* The variable ZRAMD_STEP, as NAME:NUMBER, says at which passing of which step. */
    static void zramd_step(const char *name) {
        static unsigned long passed;
        const char *wanted = getenv("ZRAMD_STEP");
        size_t length = strlen(name);
        if (!wanted || strncmp(wanted, name, length) || wanted[length] != ':')
            return;
        if (__atomic_add_fetch(&passed, 1, __ATOMIC_SEQ_CST) != strtoul(wanted + length + 1, NULL, 10))
            return;
        dprintf(2, "killed at %s\\n", name);
        kill(getpid(), SIGKILL);
    }
    #else
    #define zramd_step(name)
    #endif
    """
    void step "zramd_step"(const char *name) nogil
