//! What `cargo xtask cluster check` runs in pods: a tiny server, and commands that try the cluster from
//! inside.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::{env, fs};

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["serve"] => serve(),
        ["resolve", name] => resolve(name),
        ["get", address] => get(address),
        ["write", path, text] => fs::write(path, text),
        ["read", path] => fs::read_to_string(path).map(|text| print!("{text}")),
        _ => Err(io::Error::other(
            "usage: probe serve | resolve NAME | get HOST:PORT | write PATH TEXT | read PATH",
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let listener = TcpListener::bind("0.0.0.0:8080")?;
    println!("listening");
    for stream in listener.incoming() {
        // A client that hangs up early is no reason to stop.
        let _ = stream.and_then(answer);
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    let _ = stream.read(&mut [0; 1024])?;
    stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
}

fn resolve(name: &str) -> io::Result<()> {
    for address in (name, 0).to_socket_addrs()? {
        println!("{}", address.ip());
    }
    Ok(())
}

fn get(address: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    print!("{}", answer.rsplit("\r\n\r\n").next().unwrap_or_default());
    Ok(())
}
