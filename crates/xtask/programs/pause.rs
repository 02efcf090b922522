//! The process that holds a pod together: it only waits. The runtime ends it by SIGKILL.

fn main() {
    loop {
        std::thread::park();
    }
}
