from longspan.cli import main

main()
