/* Hides every extension past AVX2 from the process that preloads this library.
 *
 * The kernel can make the instruction CPUID fault; the handler below answers it with those bits
 * cleared. So ONNX Runtime takes, at native speed, the kernels that it takes on a CPU without
 * VNNI. Linux on x86-64, where /proc/cpuinfo lists cpuid_fault.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

static void let_cpuid_fault(int fault) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, !fault); }

static void answer(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
  (void)info;
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) { /* a fault of another kind */
    signal(number, SIG_DFL);
    return;
  }
  unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], a, b, c, d;
  let_cpuid_fault(0);
  __cpuid_count(leaf, subleaf, a, b, c, d);
  let_cpuid_fault(1);
  if (leaf == 7 && subleaf == 0) {
    b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* AVX-512 */
    c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)); /* AVX-512 VBMI, VNNI, BITALG */
    d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25)); /* FP16, AMX */
  }
  if (leaf == 7 && subleaf == 1) {
    a &= ~(BIT(4) | BIT(5));          /* AVX-VNNI, AVX-512 BF16 */
    d &= ~(BIT(4) | BIT(5) | BIT(10)); /* AVX-VNNI of other widths */
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGSEGV, &action, 0);
  let_cpuid_fault(1);
}
