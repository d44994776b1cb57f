"""What commands do outside the server: start programs and servers, look into /proc."""
