//! The server on real sockets, asked by real clients.
mod adapters;
mod answers;
mod embeddings;
mod load;
mod model;
mod openai;
mod process;
mod protocol;
mod refusals;
mod server;
mod shutdown;
